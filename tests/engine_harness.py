"""A real engine on the bundled model's decoder, with every step written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastgen
from fastgen.decoders.choice import build_decoder, plan_decoder
from fastgen.decoders.interface import StepBatch
from fastgen.decoders.plan import LoadOptions
from fastgen.engine import Engine
from fastgen.generator import open_model
from fastgen.request import Request


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


def make_engine(seats: int = 4, max_seq_len: int = 256, *, num_blocks: int = 0) -> Engine:
    """An engine of its own; `engine.decoder` is a Recorder."""
    checkpoint = open_model()
    plan = plan_decoder(checkpoint, LoadOptions(max_batch_size=seats, max_seq_len=max_seq_len))
    decoder = build_decoder(checkpoint, plan)
    if num_blocks:
        object.__setattr__(decoder.limits, "num_blocks", num_blocks)
    recorder: Any = Recorder(decoder)
    return Engine(recorder, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids)


def run_all(engine: Engine, requests: Sequence[Request], *, may_fail: bool = False) -> None:
    engine.run(lambda: all(request.done for request in requests))
    for request in requests:
        if request.error is not None and not may_fail:
            raise request.error


def assert_idle(engine: Engine) -> None:
    """Nothing runs, nothing leaked."""
    engine._scheduler.pool.check()
    assert engine.num_unfinished == 0
    assert engine.num_free_blocks == engine.decoder.limits.num_blocks


def random_prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(1, 4096, length).tolist()


def greedy(**options: Any) -> fastgen.SamplingParams:
    return fastgen.SamplingParams(temperature=0, **options)


def new_tokens(request: Request) -> list[list[int]]:
    return [row.new_token_ids for row in request.rows]
