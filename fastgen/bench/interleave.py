"""Interleaved runs, and the medians, percentiles and ratios of their times.

A machine may be shared and its speed may drift, so what is compared runs A B A B within one run,
and only medians, percentiles and ratios of that run are worth quoting.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Measure = Callable[[], float]  # does its work and returns the seconds that count


def timed(call: Callable[[], Any]) -> Measure:
    """Measures the whole call."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return measure


def interleave_calls(
    measures: Mapping[str, Measure], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each measure, A B C, A B C, ...; the first rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for round_index in range(warmups + rounds):
        for name, measure in measures.items():
            taken = measure()
            if round_index >= warmups:
                seconds[name].append(taken)
    return seconds


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate's calls, interleaved."""
    measures = {name: timed(call) for name, call in candidates.items()}
    return interleave_calls(measures, rounds=rounds, warmups=warmups)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[int(rank) - 1]


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def spread(
    values: Sequence[float], rounded: Callable[[float], float] = three_digits
) -> dict[str, float]:
    """Median, lowest and highest, as records have them."""
    found = {"median": median(values), "lowest": min(values), "highest": max(values)}
    return {name: rounded(value) for name, value in found.items()}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Of runs that stood next to each other."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of runs that stood next to each other."""
    return median(ratios(slow, fast))
