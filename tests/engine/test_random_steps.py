"""Rows that join, leave, share and are cancelled at random: each is as if it had run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from agreement import assert_rows_agree
from engine_harness import assert_idle, eos_ids_of, make_engine, random_prompt, recorder_of, run_all
from fastgen import SamplingParams
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request
from fastgen.errors import NothingToDrawError
from sampling_harness import maybe, random_filters, random_processors

VOCAB_SIZE = 4096
AT_ONCE = 12  # requests that wait or run


@dataclass
class Started:
    request: Request
    cancelled: bool = False


def add_random(
    engine: Engine, rng: np.random.Generator, texts: list[list[int]], calls: list[int]
) -> Request:
    """A prompt that begins like others', with options of every kind."""

    def halve_some(token_ids: np.ndarray, logits: np.ndarray) -> None:
        calls.append(len(token_ids))
        logits[token_ids[-1] % 7 :: 7] /= 2

    prompt = texts[rng.integers(len(texts))][: rng.integers(1, 150)]
    prompt = prompt + random_prompt(rng, int(rng.integers(0, 20)))
    others = maybe(
        rng,
        {
            "n": lambda: int(rng.integers(2, 4)),
            "logprobs": lambda: int(rng.integers(0, 3)),
            "prompt_logprobs": lambda: 0,
            "logits_processor": lambda: halve_some,
        },
        0.15,
    )
    processors = random_processors(rng, VOCAB_SIZE) if rng.random() < 0.5 else {}
    params = SamplingParams(
        temperature=float(rng.choice([0, 0.7, 1.0])),
        max_new_tokens=int(rng.integers(5, 30)),
        seed=int(rng.integers(2**63)),
        **others,
        **processors,
        **random_filters(rng, 0.3),
    )
    return engine.add_request(prompt, params, priority=int(rng.integers(-2, 3)))


def run_steps(engine: Engine, rng: np.random.Generator, num_steps: int) -> list[Started]:
    texts = [random_prompt(rng, 150) for _ in range(3)]
    calls: list[int] = []
    started: list[Started] = []
    while engine.stats.steps < num_steps:
        running = [one for one in started if not one.request.done]
        while len(running) < AT_ONCE and rng.random() < 0.8:
            running.append(Started(add_random(engine, rng, texts, calls)))
            started.append(running[-1])
        if running and rng.random() < 0.02:
            victim = running[rng.integers(len(running))]
            engine.cancel(victim.request)
            victim.cancelled = True
        if any(not one.request.done for one in running):
            until = engine.stats.steps + int(rng.integers(1, 6))

            def is_over(until: int = until, running: Sequence[Any] = running) -> bool:
                return engine.stats.steps >= until or all(one.request.done for one in running)

            engine.run(is_over)
    run_all(engine, [one.request for one in started])
    assert calls, "no row had a function of its own"
    return started


def check_alone(engine: Engine, one: Started) -> int:
    """Run the request again, and nothing else; returns how many of its rows were the same."""
    request, same = one.request, 0
    alone = engine.add_request(request.prompt_token_ids, request.params)
    run_all(engine, [alone])
    for row, other in zip(request.rows, alone.rows, strict=True):
        assert other.params.seed == row.params.seed
        ended_early = row.finish_reason == "cancelled"
        assert ended_early <= one.cancelled
        if row.finish_reason == "error":  # its options ruled everything out
            assert isinstance(row.error, NothingToDrawError)
        expected = other.new_token_ids
        if ended_early:
            expected = expected[: len(row.new_token_ids)]
        eos_ids = eos_ids_of(engine)
        prompt = request.prompt_token_ids
        agree = assert_rows_agree(prompt, row.params, row.new_token_ids, expected, eos_ids)
        same += agree
        if agree and not ended_early:
            assert row.finish_reason == other.finish_reason
    return same


@pytest.mark.parametrize(
    ("decoder", "num_steps"),
    [
        ("cpu", 250),
        ("torch", 250),
        ("late", 500),
        pytest.param("cpu", 10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_each_row_is_as_if_it_had_run_alone(decoder: str, num_steps: int) -> None:
    rng = np.random.default_rng(num_steps)
    options: dict[str, Any] = {"max_seq_len": 256, "decoder": decoder}
    engine = make_engine(seats=8, num_blocks=40, **options)  # too few for all: some wait
    started = run_steps(engine, rng, num_steps)
    assert_idle(engine)
    assert engine.stats.reused_tokens > 10 * len(started), "the test must have shared prefixes"
    alone = make_engine(seats=4, **options)
    same = sum(check_alone(alone, one) for one in started)
    if decoder == "late":
        assert recorder_of(engine).most_under_way == 2, "no step was started before one had run"
    num_rows = sum(len(one.request.rows) for one in started)
    if engine.decoder.limits.batch_invariant:
        assert same == num_rows
    assert same >= 0.98 * num_rows, "differences that PyTorch's products make are rare"
    print(f"{num_steps} steps, {len(started)} requests, {num_rows} rows, {same} to the bit")
