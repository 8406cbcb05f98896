"""SamplingParams: how one row is decoded. Frozen, and checked when it is made."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

MIN_TEMPERATURE = 1e-6  # below it, logits / temperature can overflow float32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding options of one request. Every field is keyword-only.

    Attributes:
        n: completions per prompt; sample j > 0 draws with a seed of its own, derived from `seed`.
        max_new_tokens: upper bound of new tokens; a row also ends where the context does.
        temperature: divides the logits; 0 is greedy: the highest logit, of equals the lowest id.
        top_k: keep the k highest logits and all equals of the k-th; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        stop: string, or strings, that end a row when its text contains them.
        stop_token_ids: token ids that end a row, besides eos.
        include_stop: leave the stop string, or the stop token's text, in the text.
        ignore_eos: go on after eos.
        seed: 64-bit seed; None draws one, and every Completion says which.
        logprobs: with each token its log-probability and those of the `logprobs` most likely
            tokens (0: its own only); None: none. Of the raw logits, before temperature and filters.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        TypeError: a value of the wrong type, or an unknown option (the nearest known one is named).
        ValueError: a value out of range.
    """

    n: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if args:
            raise TypeError("SamplingParams takes keyword options only, e.g. temperature=0.8")
        reject_unknown(options, (field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": _integer("n", self.n, 1),
            "max_new_tokens": _integer("max_new_tokens", self.max_new_tokens, 0),
            "temperature": _temperature(self.temperature),
            "top_k": _integer("top_k", self.top_k, 0),
            "top_p": _top_p(self.top_p),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "include_stop": _boolean("include_stop", self.include_stop),
            "ignore_eos": _boolean("ignore_eos", self.ignore_eos),
        }
        for name, upper in (("seed", 2**64 - 1), ("logprobs", 2**31), ("prompt_logprobs", 2**31)):
            value = getattr(self, name)
            checked[name] = None if value is None else _integer(name, value, 0, upper)
        if checked["max_new_tokens"] == 0 and checked["prompt_logprobs"] is None:
            raise ValueError("max_new_tokens=0 generates nothing; it needs prompt_logprobs")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def reject_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for the first option that is not known, naming the nearest known one."""
    names = sorted(known)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(names)}"
            raise TypeError(f"unknown option {name!r}; {hint}")


def _integer(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {number}")
    return number


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, not {str(value)[:20]}...") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {number}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")
    return value


def _temperature(value: Any) -> float:
    temperature = _real("temperature", value)
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= 1e6:
        allowed = f"0 (greedy) or between {MIN_TEMPERATURE} and 1e6"
        raise ValueError(f"temperature must be {allowed}, not {temperature}")
    return temperature


def _top_p(value: Any) -> float:
    top_p = _real("top_p", value)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (which keeps all), not {top_p}")
    return top_p


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else _sequence("stop", value)
    for stop in stops:
        if not isinstance(stop, str):
            raise TypeError(f"stop must hold strings, not {type(stop).__name__}")
        if not stop:
            raise ValueError("stop must not hold an empty string: it would stop everything")
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise ValueError(f"stop string {stop!r} is not valid text (a lone surrogate)")
    return tuple(dict.fromkeys(stops))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_integer(name, item, 0) for item in _sequence(name, value)))


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, not {type(value).__name__}")
    return tuple(value)
