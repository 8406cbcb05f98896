"""Checks of SamplingParams' single values; see fastgen.checks for what they raise.

Each takes the option's name and what the caller gave, and returns what the field holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastgen.checks import (
    INT32_MAX,
    integer,
    is_integer,
    real,
    sequence,
    text,
    token_ids,
    wrong_type,
    wrong_value,
)

MIN_TEMPERATURE = 1e-6  # below it, logits / temperature can overflow float32
MAX_SAMPLES = 2**16  # each keeps its tokens until the last has ended
MAX_PENALTY = 1e6
MAX_LOGIT_BIAS = 1e10

Check = Callable[[str, Any], Any]


def count(low: int, high: int = INT32_MAX) -> Check:
    """An integer from `low` to `high`."""
    return lambda name, value: integer(name, value, low, high)


def share(name: str, value: Any) -> float:
    """Above 0 and at most 1."""
    return real(name, value, 0, 1, above=True)


def share_or_zero(name: str, value: Any) -> float:
    return real(name, value, 0, 1)


def below_one(name: str, value: Any) -> float:
    cutoff = real(name, value, 0, 1)
    if cutoff == 1:
        raise wrong_value(name, "must be at least 0 (off) and below 1, not 1")
    return cutoff


def temperature(name: str, value: Any) -> float:
    number = real(name, value, 0, 1e6)
    if 0 < number < MIN_TEMPERATURE:
        problem = f"must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, not {value}"
        raise wrong_value(name, problem)
    return number


def top_k(name: str, value: Any) -> int:
    if is_integer(value) and value == -1:
        raise wrong_value(name, "must be at least 0, which keeps all, not -1")
    return integer(name, value, 0)


def deviations(name: str, value: Any) -> float:
    return real(name, value, 0, 1e6)


def penalty(name: str, value: Any) -> float:
    return real(name, value, -MAX_PENALTY, MAX_PENALTY)


def factor(name: str, value: Any) -> float:
    return real(name, value, 1 / MAX_PENALTY, MAX_PENALTY)


def length_penalty(name: str, value: Any) -> tuple[int, float]:
    """A pair: after how many new tokens it starts, and its factor."""
    pair = sequence(name, value)
    if len(pair) != 2:
        raise wrong_value(name, f"must be a pair (start, factor), not {len(pair)} values")
    start = integer(name, pair[0], 0, part="start in ")
    return start, real(name, pair[1], 1e-6, MAX_PENALTY, part="factor in ")


def logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    return _biases(name, value, lambda name, key: integer(name, key, 0, part="a token id in "))


def sequence_bias(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    return _biases(name, value, _word)


def bad_words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in (value,) if isinstance(value, str) else sequence(name, value):
        if isinstance(word, str):
            words.append(text(name, word))
            continue
        if is_integer(word):
            problem = "must hold strings or lists of token ids, not an integer"
            raise wrong_type(name, problem)
        words.append(_word(name, word))
    return tuple(dict.fromkeys(words))


def allowed_token_ids(name: str, value: Any) -> tuple[int, ...]:
    allowed = token_ids(name, value)
    if not allowed:
        raise wrong_value(name, "must allow at least one token; None allows all")
    return allowed


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else sequence(name, value)
    for stop in stops:
        if not isinstance(stop, str):
            raise wrong_type(name, f"must hold strings, not {type(stop).__name__}")
        text(name, stop)
    return tuple(dict.fromkeys(stops))


def _biases(name: str, value: Any, key_of: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else sequence(name, value)
    biases: dict[Any, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise wrong_type(name, "must be a mapping of token ids to numbers")
        key = key_of(name, pair[0])
        biases[key] = real(name, pair[1], -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, part="a value in ")
    return tuple(biases.items())


def _word(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(integer(name, item, 0) for item in sequence(name, value))
    if not ids:
        raise wrong_value(name, "must not hold an empty word")
    return ids
