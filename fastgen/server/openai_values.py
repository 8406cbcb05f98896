"""Values that OpenAI's reference allows and SamplingParams write otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastgen.checks import integer, real
from fastgen.sampling.option_checks import MAX_SAMPLES, MIN_TEMPERATURE

_LOWEST_SEED = -(2**63)
_HIGHEST_SEED = 2**64 - 1  # the library's seeds are unsigned; OpenAI's end at 2**63 - 1
_ONE_TOKEN = 1e-30  # as top_p: the most likely token alone has a higher probability


class Translation(NamedTuple):
    """`meaning`: the library's value of a field's; None: as if the field were absent.
    `minimum`: the field's lowest value."""

    meaning: Callable[[Any], Any]
    minimum: int


def _seed(value: Any) -> int:
    """Of a negative seed the same 64 bits, unsigned."""
    return integer("seed", value, _LOWEST_SEED, _HIGHEST_SEED) % 2**64


def _top_p(value: Any) -> float:
    """0 leaves the most likely token."""
    return max(real("top_p", value, 0, 1), _ONE_TOKEN)


def _temperature(value: Any) -> Any:
    """So low a one as the library has not is greedy."""
    return 0.0 if isinstance(value, float) and 0 < value < MIN_TEMPERATURE else value


def _best_of(value: Any) -> int | None:
    return integer("best_of", value, 0, MAX_SAMPLES) or None


TRANSLATIONS: Mapping[str, Translation] = {
    "seed": Translation(_seed, _LOWEST_SEED),
    "top_p": Translation(_top_p, 0),
    "temperature": Translation(_temperature, 0),
    "best_of": Translation(_best_of, 0),
}


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the sampler with the library's values.

    Raises:
        OptionTypeError, OptionError: a value is one that OpenAI's reference does not allow.
    """
    found = {}
    for name, value in options.items():
        meaning = TRANSLATIONS[name].meaning(value) if name in TRANSLATIONS else value
        if meaning is not None:
            found[name] = meaning
    return found
