"""What the engine adds to a decoder's step: the scheduler's part of it, and all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from timed_decoder import InstantDecoder

import fastgen
from fastgen.bench.shapes import SHAPES, VOCAB_SIZE, random_prompts, save_checkpoint
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request, Row
from fastgen.engine.scheduler import Admission, Scheduler, StepPlan
from fastgen.sampling.definition import KNOWN_OPTIONS
from fastgen.sampling.draw import Draw

ROWS = (1, 8, 32, 128)
MAX_LEN = 1024  # tokens of a row
PROMPT = 512  # tokens of a prompt that is looked up
SHARED = PROMPT - BLOCK_SIZE  # of them in the cache, if it is found
STEPS = 32  # of the engine, in one call
PARAMS = fastgen.SamplingParams(
    max_new_tokens=MAX_LEN, ignore_eos=True, temperature=0, seed=0
)  # rows end for no other reason than their length


def make_scheduler(num_seats: int) -> Scheduler:
    return Scheduler(
        Capacity(
            num_blocks=num_seats * blocks_for(MAX_LEN),
            block_size=BLOCK_SIZE,
            max_seq_len=MAX_LEN,
            max_tokens=256,
            max_logits=128,
            num_seats=num_seats,
            batch_invariant=True,
        )
    )


def add_row(scheduler: Scheduler, prompt: list[int]) -> Row:
    request = Request(tuple(prompt), PARAMS)
    request.make_rows(0, MAX_LEN, frozenset(), None, KNOWN_OPTIONS)
    [row] = request.rows
    scheduler.waiting.add(row)
    return row


def step(scheduler: Scheduler) -> StepPlan:
    """What the scheduler does in one step."""
    scheduler.admit()
    plan = scheduler.schedule()
    assert plan is not None
    for entry in plan.entries:
        scheduler.advance(entry)
    return plan


def hand_out(plan: StepPlan, rng: np.random.Generator) -> None:
    """A drawn token for each row that was to get one."""
    ids = rng.integers(0, VOCAB_SIZE, len(plan.entries)).tolist()
    for entry, token_id in zip(plan.entries, ids, strict=True):
        if entry.needs_draw:
            entry.row.accept(Draw(entry.row.schedule.seat, token_id), frozenset())


def prefill(scheduler: Scheduler, rng: np.random.Generator) -> StepPlan:
    """Until every row decodes; the first step in which all do, not yet handed out."""
    while (plan := step(scheduler)).num_decoding < scheduler.num_unfinished:
        hand_out(plan, rng)
    return plan


@pytest.mark.parametrize("rows", ROWS)
def test_schedule(rows: int, rng: np.random.Generator, timed: Any, describe: Any) -> None:
    """A step of rows that decode; they fill their blocks at different times."""
    scheduler = make_scheduler(max(ROWS))
    for length in rng.integers(BLOCK_SIZE, 2 * BLOCK_SIZE, rows).tolist():
        add_row(scheduler, *random_prompts(1, length, rng))
    plan = prefill(scheduler, rng)

    def call(_: None) -> None:
        nonlocal plan
        plan = step(scheduler)

    timed(call, lambda: hand_out(plan, rng), group="scheduler: a step", rounds=300)
    assert plan.num_decoding == len(plan.entries) == rows
    scheduler.pool.check()
    describe(rows=rows, tokens=rows)


@pytest.mark.parametrize("cached", [0, SHARED], ids=["nothing found", "all but a block found"])
def test_admit_long_prompt(
    cached: int, rng: np.random.Generator, timed: Any, describe: Any
) -> None:
    """Hashing the prompt's blocks, looking them up, and taking what the row needs."""
    scheduler = make_scheduler(8)
    [known] = random_prompts(1, PROMPT, rng)
    rows = [add_row(scheduler, known)]
    prefill(scheduler, rng)

    def make() -> None:
        if len(rows) > 1:
            scheduler.remove(rows.pop())
        [fresh] = random_prompts(1, PROMPT - cached, rng)
        rows.append(add_row(scheduler, known[:cached] + fresh))

    def call(_: None) -> list[Admission]:
        return scheduler.admit()

    [admission] = timed(call, make, group="scheduler: admit a prompt", rounds=100)
    assert admission.error is None and admission.row is rows[-1]
    assert admission.row.schedule.lease.num_tokens == cached
    scheduler.pool.check()
    describe(rows=1, tokens=PROMPT, cached=cached)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastgen.Generator]:
    """Never run: its decoder knows limits and seats."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"])
    with fastgen.load(folder, device="cpu", max_batch_size=max(ROWS)) as model:
        yield model


@pytest.mark.parametrize("rows", ROWS)
def test_engine_steps(
    rows: int,
    tiny: fastgen.Generator,
    rng: np.random.Generator,
    timed: Any,
    describe: Any,
) -> None:
    """Whole steps with a decoder that draws at once: schedule, hand out, and what lies between."""
    engine = Engine(InstantDecoder(tiny.engine.decoder), VOCAB_SIZE)
    prompts = random_prompts(rows, BLOCK_SIZE, rng)
    requests = [engine.add_request(prompt, PARAMS) for prompt in prompts]
    engine.run(lambda: all(request.first_token is not None for request in requests))

    def call(_: None) -> None:
        end = engine.stats.steps + STEPS
        engine.run(lambda: engine.stats.steps == end)

    steps, tokens = engine.stats.steps, engine.stats.decode_tokens
    timed(call, group=f"engine: {STEPS} steps without a decoder", rounds=20)
    assert engine.stats.decode_tokens - tokens == rows * (engine.stats.steps - steps) > 0
    assert engine.stats.failed_steps == 0 and engine.num_unfinished == rows
    for request in requests:
        engine.cancel(request)
    assert engine.num_unfinished == 0
    describe(rows=rows, steps=STEPS, tokens=rows * STEPS)
