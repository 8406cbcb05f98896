"""What the benchmarks of the engine's parts share: how a call is timed, and how it is described.

    make bench [ONLY=sampler]     run and save them     make bench-compare     the last two runs

Every round of a benchmark gets new random input, made from a fixed seed and not timed. Numbers of
one part show where the time of a step goes, and what a change does to it; what a user gets of it
is measured by the scripts beside this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Timed = Callable[..., Any]
Describe = Callable[..., None]

HELD_OUT = Path(__file__).parents[2] / "tests" / "data" / "held_out.txt"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def held_out() -> str:
    """Text that the bundled model was not trained on, without special tokens."""
    return HELD_OUT.read_text().replace("<|endoftext|>", "")


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """`timed(call, make, group=..., rounds=...)`: time `call(make())`, but not `make`, once a round
    and in a few rounds before; returns what the last call did."""

    def run(
        call: Callable[[Any], Any],
        make: Callable[[], Any] = lambda: None,
        *,
        group: str,
        rounds: int,
        warmups: int = 2,
    ) -> Any:
        benchmark.group = group
        return benchmark.pedantic(
            call, setup=lambda: ((make(),), {}), rounds=rounds, warmup_rounds=warmups
        )

    return run


@pytest.fixture
def describe(benchmark: Any) -> Describe:
    """`describe(rows=8, tokens=8)`: what one call did, into the saved run; where it was timed, with
    the median's microseconds a row and step, tokens a second and megabytes (10^6) a second."""

    def add(**counts: Any) -> None:
        benchmark.extra_info.update(counts)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        rates = {}
        if "rows" in counts:
            row_steps = counts["rows"] * counts.get("steps", 1)
            rates["per_row_us"] = round(seconds / row_steps * 1e6, 3)
        if "tokens" in counts:
            rates["tokens_per_s"] = round(counts["tokens"] / seconds, 1)
        if "megabytes" in counts:
            rates["megabytes_per_s"] = round(counts["megabytes"] / seconds, 1)
        benchmark.extra_info.update(rates)

    return add
