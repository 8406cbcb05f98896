"""A real engine on the bundled model's decoder, with every step written down; and one on a decoder
that only counts, where an engine's books are to be tried out thousands of times.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastgen
from fastgen.decoders.interface import Capacity, PendingStep, StepBatch, check_batch
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.engine.blocks import BlockPool
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request, Row
from fastgen.engine.scheduler import Scheduler
from fastgen.frontends.generator import open_model
from fastgen.results import TokenLogprobs
from fastgen.sampling.definition import KNOWN_OPTIONS
from fastgen.sampling.draw import Draw
from late_decoder import LateDecoder
from simulation import assert_nothing_held


class Recorder:
    """Passes everything on to a decoder and keeps the batches; `before_step` may raise."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.batches: list[StepBatch] = []
        self.copies: list[tuple[int, int]] = []
        self.before_step: Callable[[StepBatch], None] = lambda batch: None

    def step(self, batch: StepBatch) -> Any:
        self.batches.append(batch)
        self.before_step(batch)
        return self._decoder.step(batch)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.copies += pairs
        self._decoder.copy_blocks(pairs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    @property
    def step_tokens(self) -> list[int]:
        return [len(batch.token_ids) for batch in self.batches]


def make_engine(
    seats: int = 4,
    max_seq_len: int = 256,
    *,
    num_blocks: int = 0,
    decoder: str = "auto",
    model: Path | None = None,
) -> Engine:
    """An engine of its own; `engine.decoder` is a Recorder. "late": a LateDecoder of the CPU's."""
    checkpoint = open_model(model)
    name = "cpu" if decoder == "late" else decoder
    options = LoadOptions(decoder=name, max_batch_size=seats, max_seq_len=max_seq_len)
    plan = plan_decoder(checkpoint, options)
    built: Any = build_decoder(checkpoint, plan)
    if num_blocks:
        object.__setattr__(built.limits, "num_blocks", num_blocks)
    recorder: Any = Recorder(LateDecoder(built) if decoder == "late" else built)
    return Engine(recorder, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids)


def recorder_of(engine: Engine) -> Recorder:
    """The decoder of an engine that `make_engine` has made."""
    decoder: Any = engine.decoder
    assert isinstance(decoder, Recorder)
    return decoder


def next_counted(token_ids: Any, positions: Any) -> Any:
    """What a CountingDecoder draws after tokens at these positions."""
    return (31 * token_ids + 7 * positions + 11) % 97


class CountingDecoder:
    """The next token follows from the last one and its place; nothing is computed or kept.

    Seats have to be bound before they draw, and released before they are bound again.
    """

    vocab_size = 97
    is_async = False
    survives_fork = True
    known_options = KNOWN_OPTIONS - {"logits_processor"}

    def __init__(self, limits: Capacity) -> None:
        self.limits = limits
        self.params: dict[int, fastgen.SamplingParams] = {}  # by seat
        self.logits = np.zeros((0, self.vocab_size), np.float32)  # of the last step
        self.draws: list[Draw] = []

    def step(self, batch: StepBatch) -> CountingDecoder:
        check_batch(batch, self.limits)
        assert (batch.block_tables >= 0).all() and (
            batch.block_tables < self.limits.num_blocks
        ).all()
        drawn = next_counted(batch.token_ids, batch.positions)[batch.logits_at]
        host = batch.seats < 0
        self.logits = np.eye(self.vocab_size, dtype=np.float32)[drawn[host]]
        self.draws, refused = [], -1  # the seat whose draft was wrong
        drafts = batch.drafts_after(batch.logits_at)
        for seat, token_id, draft in zip(
            batch.seats[~host].tolist(), drawn[~host].tolist(), drafts[~host].tolist(), strict=True
        ):
            if seat != refused:
                self.draws.append(self._draw(seat, token_id))
            refused = seat if token_id != draft else -1
        return self

    def _draw(self, seat: int, token_id: int) -> Draw:
        wanted = self.params[seat].logprobs
        logprobs = None if wanted is None else TokenLogprobs(token_id, -float(token_id))
        return Draw(seat, token_id, True, logprobs)

    def wait(self) -> list[Draw]:
        return self.draws

    def bind(self, seat: int, params: fastgen.SamplingParams, token_ids: Sequence[int]) -> None:
        assert seat not in self.params
        self.params[seat] = params

    def release(self, seat: int) -> None:
        del self.params[seat]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        pass


def make_counting_engine(seats: int = 4, num_blocks: int = 32) -> Engine:
    decoder: Any = CountingDecoder(
        Capacity(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_seq_len=128, max_tokens=80,
            max_logits=40, num_seats=seats, batch_invariant=True,
        )
    )  # fmt: skip
    return Engine(decoder, CountingDecoder.vocab_size)


def counting_decoder_of(engine: Engine) -> CountingDecoder:
    decoder: Any = engine.decoder
    assert isinstance(decoder, CountingDecoder)
    return decoder


def run_all(engine: Engine, requests: Sequence[Request], *, may_fail: bool = False) -> None:
    engine.run(lambda: all(request.done for request in requests))
    for request in requests:
        if request.error is not None and not may_fail:
            raise request.error


# What tests may know of an engine's inside stands here, and nowhere else.


def assert_idle(engine: Engine) -> None:
    """Nothing runs, nothing leaked: blocks, seats, announcements."""
    assert engine.num_unfinished == 0
    assert_nothing_held(engine._scheduler)


def assert_inbox_empty(engine: Engine) -> None:
    assert not engine._inbox.arrived and not engine._inbox.cancelled
    assert num_deadlines(engine) == 0


def num_deadlines(engine: Engine) -> int:
    """Those that are remembered, of requests that have ended, too."""
    return len(engine._inbox._deadlines)


def check_blocks(engine: Engine) -> None:
    """Raise AssertionError if the books of the blocks do not balance."""
    block_pool(engine).check()


def block_pool(engine: Engine) -> BlockPool:
    """To make its calls fail."""
    return engine._scheduler.pool


def scheduler_of(engine: Engine) -> Scheduler:
    """To make its calls fail."""
    return engine._scheduler


def running_rows(engine: Engine) -> list[Row]:
    return list(engine._scheduler.running)


def steps_under_way(engine: Engine) -> list[PendingStep]:
    """The oldest first."""
    return [step for _, step in engine._under_way]


def eos_ids_of(engine: Engine) -> frozenset[int]:
    return frozenset(engine._eos_ids)


def random_prompt(rng: np.random.Generator, length: int) -> list[int]:
    token_ids: list[int] = rng.integers(1, 4096, length).tolist()
    return token_ids


def greedy(**options: Any) -> fastgen.SamplingParams:
    return fastgen.SamplingParams(temperature=0, **options)


def new_tokens(request: Request) -> list[list[int]]:
    return [row.new_token_ids for row in request.rows]


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Of this process: what others have of the processor does not count."""
    before = time.process_time()
    work()
    return time.process_time() - before


def assert_linear(work: Callable[[int], Any], size: int) -> None:
    """Four times the size takes four times as long, and not sixteen times."""
    small, large = (min(cpu_seconds(partial(work, n)) for _ in range(2)) for n in (size // 4, size))
    assert large < 10 * small, (small, large)


def num_calls(work: Callable[[], Any]) -> int:
    """How many functions are called, Python's and C's: a measure that no slow machine changes."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def assert_pickles(error: BaseException) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert vars(again) == vars(error)
