"""The CPU decoder: csrc/decoder/ as a Decoder. Imports neither torch nor transformers.

A step is one call into C++, draws included, with the GIL released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.interface import Capacity, StepBatch, check_batch, with_capacity
from fastgen.decoders.memory import MemoryPlan
from fastgen.sampling.draw import Draw
from fastgen.sampling.native_sampler import NativeSampler
from fastgen.sampling.params import SamplingParams

Floats = NDArray[np.float32]


@dataclass(slots=True)
class CpuStep:
    """A step that has been made: `logits` lie in the decoder's memory until its next call."""

    draws: list[Draw]
    logits: Floats
    drawn_logits: Floats
    is_async: ClassVar[bool] = False

    def wait(self) -> list[Draw]:
        return self.draws


class CpuDecoder:
    """See fastgen.decoders.interface.Decoder."""

    survives_fork: ClassVar[bool] = True  # it starts new threads there

    def __init__(
        self,
        decoder: Any,
        config: GPT2Config,
        limits: Capacity,
        memory: MemoryPlan,
        *,
        num_threads: int,
    ) -> None:
        """`decoder`: the C++ decoder with its weights (weights.py)."""
        self._native, self.limits, self._memory = decoder, limits, memory
        self._no_drafts = np.full(limits.max_logits, -1, np.int32)
        self._sampler = NativeSampler(
            limits.num_seats,
            config.vocab_size,
            config.eos_token_ids,
            limits.max_seq_len,
            num_threads,
        )
        self.known_options = self._sampler.known_options

    def forward(self, batch: StepBatch) -> Floats:
        check_batch(batch, self.limits)
        logits: Floats = self._native.forward(*self._rows(batch), batch.logits_at)
        return logits

    def step(self, batch: StepBatch) -> CpuStep:
        check_batch(batch, self.limits)
        seats, logits_at = batch.seats, batch.logits_at
        if len(seats) and seats.min() < 0:  # logits for the host follow those that are drawn from
            drawing = seats >= 0
            seats = seats[drawing]
            logits_at = np.concatenate([logits_at[drawing], logits_at[~drawing]])
        if not len(seats):
            logits = self._native.forward(*self._rows(batch), logits_at)
            return CpuStep([], logits, logits[:0])
        if len(batch.token_ids) == len(batch.cache_lens):  # one a row: none can be a draft
            drafts = self._no_drafts[: len(seats)]
        else:
            drafts = batch.drafts_after(logits_at[: len(seats)])
        max_top = self._sampler.max_top(seats)
        found, logits = self._native.step(
            *self._rows(batch), logits_at, self._sampler.native, seats, drafts, max_top
        )
        draws = self._sampler.taken(seats, *found)
        return CpuStep(draws, logits[len(seats) :], logits[: len(seats)])

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self._sampler.bind(seat, params, token_ids)

    def observe(self, seat: int, token_id: int) -> None:
        self._sampler.observe(seat, token_id)

    def release(self, seat: int) -> None:
        self._sampler.release(seat)

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        self._sampler.set_mask(seat, allowed)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._native.copy_blocks(np.array(pairs, dtype=np.int32).reshape(-1, 2))

    def reserve(self, blocks: int, seats: int) -> None:
        before, limits = self.limits, with_capacity(self.limits, blocks, seats)
        self._native.reserve(limits.num_blocks)
        if seats > before.num_seats:
            self._sampler.reserve(seats)
        kv_cache = self._memory.kv_cache // before.num_blocks * limits.num_blocks
        self.limits = limits
        self._memory = replace(self._memory, num_blocks=limits.num_blocks, kv_cache=kv_cache)

    def memory(self) -> MemoryPlan:
        return self._memory

    def warmup(self) -> None:
        """Find the ranges of keys and values of 8 bits; else the first step does it."""
        self._native.warmup()

    def close(self) -> None:
        self._native.close()

    def _rows(self, batch: StepBatch) -> tuple[NDArray[np.int32], ...]:
        """A step's arrays, with what a seat drew last put in for negative ids."""
        ids = batch.token_ids
        if ids.min() < 0:
            drawn = self._sampler.last_drawn.astype(np.int32)[np.maximum(-1 - ids, 0)]
            ids = np.where(ids < 0, drawn, ids)
        return ids, batch.positions, batch.row_starts, batch.cache_lens, batch.block_tables
