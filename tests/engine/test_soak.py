"""A long run of mixed requests: they join, leave, are cancelled and share, and nobody notices."""

from __future__ import annotations

import resource
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import fastgen
from agreement import assert_rows_agree
from engine_harness import assert_idle, make_engine, random_prompt, recorder_of, run_all
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request


def random_request(engine: Engine, rng: np.random.Generator, systems: list[list[int]]) -> Request:
    system = systems[int(rng.integers(len(systems)))] if rng.random() < 0.6 else []
    prompt = system + random_prompt(rng, int(rng.integers(1, 60)))
    params = fastgen.SamplingParams(
        n=int(rng.integers(1, 4)),
        max_new_tokens=int(rng.integers(1, 30)),
        temperature=float(rng.choice([0.0, 0.8, 1.2])),
        top_k=int(rng.choice([0, 40])),
        top_p=float(rng.choice([1.0, 0.9])),
        seed=int(rng.integers(2**63)),
    )
    return engine.add_request(prompt, params)


def run_mixed(engine: Engine, count: int, seed: int) -> list[Request]:
    """Requests arrive a few a step; every seventh is cancelled after a few steps."""
    rng = np.random.default_rng(seed)
    systems = [random_prompt(rng, length) for length in (20, 32, 100)]
    requests: list[Request] = []
    doomed: list[tuple[int, Request]] = []
    while len(requests) < count or not all(request.done for request in requests):
        for _ in range(int(rng.integers(0, 3)) if len(requests) < count else 0):
            requests.append(random_request(engine, rng, systems))
            if len(requests) % 7 == 0:
                doomed.append((engine.stats.steps + int(rng.integers(0, 12)), requests[-1]))
        for due, request in doomed:
            if due <= engine.stats.steps:
                engine.cancel(request)
        if not all(request.done for request in requests):
            steps = engine.stats.steps
            engine.run(partial(_moved_on, engine, steps, requests))
    return requests


def _moved_on(engine: Engine, steps: int, requests: list[Request]) -> bool:
    return engine.stats.steps > steps or all(request.done for request in requests)


def check_alone(requests: list[Request], every: int) -> None:
    """Compare some rows with the same rows run alone on a fresh engine."""
    alone = make_engine(seats=1)
    rows = [row for request in requests for row in request.rows][::every]
    for row in rows:
        again = alone.add_request(row.request.prompt_token_ids, replace(row.params, n=1))
        run_all(alone, [again])
        found, expected = row.new_token_ids, again.rows[0].new_token_ids
        if row.finish_reason == "cancelled":
            expected = expected[: len(found)]
        assert_rows_agree(row.request.prompt_token_ids, row.params, found, expected)


def test_mixed_requests_end_as_if_alone() -> None:
    engine = make_engine(seats=6)
    requests = run_mixed(engine, 60, seed=1)
    assert_idle(engine)
    assert engine.stats.reused_tokens > 500
    assert {row.finish_reason for r in requests for row in r.rows} >= {"length", "cancelled"}
    check_alone(requests, every=3)


@pytest.mark.slow
def test_two_thousand_mixed_requests() -> None:
    """The same 400 again and again: once their steps' shapes are known, memory stays as it is.

    (PyTorch's oneDNN keeps code for each number of tokens that a step has had, in bounded caches;
    the second round has other shapes than the first, as it finds prompts in the cache.)
    """
    engine = make_engine(seats=8)
    peaks = []
    for _ in range(5):
        requests = run_mixed(engine, 400, seed=3)
        recorder_of(engine).batches.clear()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert_idle(engine)
    assert peaks[4] - peaks[2] < 40_000, f"peak memory after each round, kB: {peaks}"
    check_alone(requests, every=11)
