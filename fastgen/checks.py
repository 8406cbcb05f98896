"""Checks of single values that a caller gave: plain Python out, or an error that names the option.

Each raises OptionTypeError (a TypeError) for a value of the wrong type, and OptionError (a
ValueError) for one out of range. `name` is the option, and the error's `option`; `part` comes
before it in the message where only a part of the option is wrong, e.g. "a token id in ".
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastgen.errors import OptionError, OptionTypeError

INT32_MAX = 2**31 - 1


def reject_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise OptionTypeError for the first that is not known, naming the nearest known one."""
    names = sorted(known)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(names)}"
            raise OptionTypeError(f"unknown option {name!r}; {hint}", name)


def wrong_value(name: str, problem: str, part: str = "") -> OptionError:
    return OptionError(f"{part}{name} {problem}", name, problem)


def wrong_type(name: str, problem: str, part: str = "") -> OptionTypeError:
    return OptionTypeError(f"{part}{name} {problem}", name, problem)


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, low: int, high: int = INT32_MAX, *, part: str = "") -> int:
    if not is_integer(value):
        raise wrong_type(name, f"must be an integer, not {type(value).__name__}", part)
    number = operator.index(value)
    if not low <= number <= high:
        raise wrong_value(name, f"must be between {low} and {high}, not {brief(number)}", part)
    return number


def real(
    name: str, value: Any, low: float, high: float, *, above: bool = False, part: str = ""
) -> float:
    """A finite float from `low` (which itself is refused if `above`) to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, f"must be a number, not {type(value).__name__}", part)
    try:
        number = float(value)
    except OverflowError:
        raise wrong_value(name, f"must be finite, not {brief(value)}", part) from None
    if not math.isfinite(number):
        raise wrong_value(name, f"must be finite, not {number}", part)
    if not low <= number <= high or (above and number == low):
        between = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise wrong_value(name, f"must be {between}, not {number}", part)
    return number


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, f"must be True or False, not {type(value).__name__}")
    return value


def function(name: str, value: Any) -> Callable[..., Any] | None:
    if value is not None and not callable(value):
        raise wrong_type(name, f"must be a function, not {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def sequence(name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list, tuple or other iterable; None is an empty one."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wrong_type(name, f"must be a sequence, not {type(value).__name__}")
    return tuple(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids in their order, each once."""
    return tuple(dict.fromkeys(integer(name, item, 0) for item in sequence(name, value)))


def text(name: str, value: str) -> str:
    """A string that is not empty and can be encoded."""
    if not value:
        raise wrong_value(name, "must not hold an empty string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise wrong_value(name, f"holds {value!r}, which is not valid text (a lone surrogate)")
    return value


def brief(value: Any) -> str:
    """A number that may have thousands of digits."""
    try:
        shown = str(value)
    except ValueError:  # more digits than Python turns into text
        return f"a number of {int(value).bit_length()} bits"
    return shown if len(shown) <= 24 else f"{shown[:20]}..."
