"""The arithmetic of bench_serving.py: when requests come, and what is made of their times."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "open_loop.py"


@pytest.fixture(scope="module")
def load() -> Any:
    spec = importlib.util.spec_from_file_location("open_loop", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["open_loop"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_arrivals_are_a_poisson_process(load: Any) -> None:
    due = load.arrivals(5.0, 20_000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *due], due, strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert abs(mean - 0.2) < 0.01 and abs(variance**0.5 - 0.2) < 0.01  # exponential: both equal
    assert due == load.arrivals(5.0, 20_000, seed=1) != load.arrivals(5.0, 20_000, seed=2)


def test_times_count_from_when_a_request_was_due(load: Any) -> None:
    """And what fails, stops short or comes too late is told."""
    begun: list[int] = []

    async def send(prompt: list[int], new_tokens: int) -> AsyncIterator[None]:
        begun.append(prompt[0])
        if prompt[0] == 1:
            raise OSError("refused")
        if prompt[0] == 3:
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        for _ in range(new_tokens if prompt[0] != 2 else 1):
            yield

    due = [0.0, 0.01, 0.02, 0.03, 0.1]
    prompts = [[at] for at in range(5)]
    outcomes = asyncio.run(load.drive(send, prompts, 3, due, 5))
    assert begun == [0, 1, 2, 3, 4]
    assert [outcome.error for outcome in outcomes] == [
        None, "OSError: refused", "1 of 3 tokens", "too late", None,
    ]  # fmt: skip
    assert all(outcomes[at].first_token >= 0.05 for at in (0, 4))
    assert len(outcomes[0].gaps) == 2


def test_a_summary_counts_what_came_in_good_time(load: Any) -> None:
    good = load.Outcome([0.1, 0.2, 0.3])
    late = load.Outcome([2.0, 2.1, 2.2])
    slow = load.Outcome([0.1, 0.9, 1.7])
    lost = load.Outcome([0.1], "1 of 3 tokens")
    record = load.summary([good, late, slow, lost], 2.0, first_token=1.0, gap=0.15)
    assert record == {
        "requests": 4, "failed": 1, "goodput": 0.5, "tokens_a_second": 5.0,
        "ttft_p50_ms": 100.0, "ttft_p99_ms": 2000.0, "gap_p50_ms": 100.0, "gap_p99_ms": 800.0,
    }  # fmt: skip
    assert load.summary([lost], 1.0, first_token=1, gap=1)["ttft_p50_ms"] is None
