"""The CUDA decoder: the Triton kernels (kernels/) as a Decoder.

A step with one token a row is a CUDA graph (graphs.py). Other steps launch their kernels one by
one, as all steps do where graphs are off. The device draws, and writes ids where the host can read
them: the host waits only in `PendingStep.wait`.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.cuda.graphs import DecodeGraphs
from fastgen.decoders.cuda.inputs import (
    InputCopier,
    inputs_size,
    is_plain_decode,
    new_event,
    parts_of,
    step_inputs,
)
from fastgen.decoders.cuda.model import SMALL_TILE, CudaModel
from fastgen.decoders.cuda.sampler import RING, CudaSampler, Kind
from fastgen.decoders.cuda.weights import CudaWeights
from fastgen.decoders.interface import Capacity, Ints, StepBatch, check_batch, with_capacity
from fastgen.decoders.memory import MemoryPlan, blocks_for
from fastgen.kernels.launch import Settings
from fastgen.sampling.draw import Draw
from fastgen.sampling.params import SamplingParams

P = ParamSpec("P")
T = TypeVar("T")
_NO_SEAT = np.int32(-1)
_PREFILLS = (2, 24, 100, 700, 2048)  # tokens: one for each way that products are cut
_UNKNOWN = np.iinfo(np.int32).min  # in _last_ids: drawn, and not yet seen; no feedback id


def _on_stream(method: Callable[P, T]) -> Callable[P, T]:
    """What a method of CudaDecoder starts, it starts on the decoder's device and stream."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        stream = args[0]._stream  # type: ignore[attr-defined]
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.inference_mode(), on_stream:
            return method(*args, **kwargs)

    return run


@dataclass(slots=True)
class CudaStep:
    """A step under way. `draws` is None until the host has seen them."""

    decoder: CudaDecoder
    batch: StepBatch
    number: int
    event: torch.cuda.Event | None
    draws: list[Draw] | None = None

    @property
    def is_async(self) -> bool:
        return self.draws is None

    def wait(self) -> list[Draw]:
        if self.draws is None:
            self.draws = self.decoder.take(self)
        return self.draws

    @property
    def logits(self) -> NDArray[np.float32]:
        return self._rows(self.batch.seats < 0)

    @property
    def drawn_logits(self) -> NDArray[np.float32]:
        return self._rows(self.batch.seats >= 0)

    def _rows(self, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
        return self.decoder.logits_of(np.flatnonzero(chosen))


class CudaDecoder:
    """See fastgen.decoders.interface.Decoder."""

    survives_fork: ClassVar[bool] = False  # the device's context is its process's own

    def __init__(
        self,
        config: GPT2Config,
        weights: CudaWeights,
        settings: Settings,
        limits: Capacity,
        memory: MemoryPlan,
        device: torch.device,
        *,
        int8_kv: bool = False,
    ) -> None:
        self.limits, self._memory = limits, memory
        self._device = device
        # Its own, so that steps follow each other whichever thread starts them.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._model = CudaModel(config, weights, settings, limits, device, int8_kv=int8_kv)
        self._sampler = CudaSampler(
            settings,
            limits.num_seats,
            config.vocab_size,
            frozenset(config.eos_token_ids),
            limits.max_seq_len,
            limits.max_logits,
            device,
        )
        self.known_options = self._sampler.known_options
        self._copier = InputCopier(inputs_size(limits), device)
        self._graphs = None
        if os.environ.get("FASTGEN_CUDA_GRAPHS", "1") != "0":
            self._graphs = DecodeGraphs(self._model, self._sampler, limits)
        self._large_tile = large_tile(config, settings)
        self._last_ids = np.full(limits.num_seats, _UNKNOWN, np.int32)  # by seat
        self._drawn_in = np.full(limits.num_seats, -1)  # the number of the seat's last step
        self._events = [new_event(device) for _ in range(RING)]
        self._synchronize()  # weights and blocks were filled on another stream

    def forward(self, batch: StepBatch) -> Tensor:
        logits = self._forward(batch)
        if self._stream is not None:  # readers on the current stream come after these kernels
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return logits

    @_on_stream
    def _forward(self, batch: StepBatch) -> Tensor:
        check_batch(batch, self.limits)
        self._run(batch, batch.seats)
        logits: Tensor = self._sampler.scores.logits
        return logits[: len(batch.logits_at)]

    @_on_stream
    def step(self, batch: StepBatch) -> CudaStep:
        check_batch(batch, self.limits)
        sampler = self._sampler
        sampler.flush()
        seats = np.where(sampler.on_host[batch.seats], _NO_SEAT, batch.seats)  # on the device
        seats[batch.seats < 0] = _NO_SEAT
        if self._graphs is not None and is_plain_decode(batch, self.limits):
            with self._all_or_nothing():
                self._graphs.launch(self._with_feedback(batch, seats), seats)
                sampler.num_steps += 1
            return self._pending(batch, seats, np.zeros_like(seats))
        parts = self._run(batch, seats)
        draw_index = _draw_indices(seats)  # 0 for the first draw of each seat; drafts make more
        if draw_index.any():
            parts["seats"].copy_(torch.from_numpy(np.where(draw_index == 0, seats, _NO_SEAT)))
        self._launch(parts["seats"], seats)
        return self._pending(batch, seats, draw_index, parts["seats"])

    @_on_stream
    def take(self, step: CudaStep) -> list[Draw]:
        """The draws of a step, in order; it is waited for."""
        assert self._sampler.num_steps - step.number < RING, "waited for too late"
        if step.event is not None:
            step.event.synchronize()
        at = np.flatnonzero(step.batch.seats >= 0)
        return self._taken(step, at)

    def _taken(self, step: CudaStep, at: NDArray[np.intp]) -> list[Draw]:
        """Of a step that has run, what the device drew at these of its logits."""
        seats, ids = step.batch.seats[at], self._sampler.line(step.number)[at]
        latest = self._drawn_in[seats] == step.number
        self._last_ids[seats[latest]] = np.maximum(ids[latest], 0)
        return self._sampler.draws_of(seats, ids, at)

    @_on_stream
    def logits_of(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """(len(rows), V) of the last step's logits, on the host."""
        logits = self._sampler.scores.logits
        index = torch.from_numpy(rows).to(self._device)
        host: NDArray[np.float32] = logits.index_select(0, index).cpu().numpy()
        return host

    @_on_stream
    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self._sampler.bind(seat, params, token_ids)

    @_on_stream
    def observe(self, seat: int, token_id: int) -> None:
        self._interrupt()
        self._sampler.observe(seat, token_id)
        self._last_ids[seat], self._drawn_in[seat] = token_id, -1

    def release(self, seat: int) -> None:
        self._sampler.release(seat)

    @_on_stream
    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        self._sampler.set_mask(seat, allowed)

    @_on_stream
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if not len(pairs):
            return
        index = torch.from_numpy(np.array(pairs, dtype=np.int64)).to(self._device)
        self._model.copy_blocks(*index.unbind(1))

    @_on_stream
    def reserve(self, blocks: int, seats: int) -> None:
        before, limits = self.limits, with_capacity(self.limits, blocks, seats)
        if limits == before:
            return
        self._synchronize()
        if blocks > before.num_blocks:
            self._model.grow(limits.num_blocks)
        if seats > before.num_seats:
            self._sampler.reserve(seats)
            more = seats - before.num_seats
            self._last_ids = np.append(self._last_ids, np.full(more, _UNKNOWN, np.int32))
            self._drawn_in = np.append(self._drawn_in, np.full(more, -1))
        if self._graphs is not None:
            self._graphs = DecodeGraphs(self._model, self._sampler, limits)
        self._synchronize()  # what was copied is given back to PyTorch
        self.limits = limits
        kv_cache = self._memory.kv_cache // before.num_blocks * limits.num_blocks
        self._memory = replace(self._memory, num_blocks=limits.num_blocks, kv_cache=kv_cache)

    def memory(self) -> MemoryPlan:
        return self._memory

    @_on_stream
    def warmup(self) -> None:
        """Make the graphs of greedy rows and of rows that sample, for every bucket, and compile
        what prompts of any length need."""
        if self._graphs is not None:
            self._graphs.make_all([Kind(), Kind(samples=True), Kind(samples=True, weighs=True)])
        if self._stream is not None:  # nothing is compiled in the interpreter
            for num_tokens in _PREFILLS:
                self.rehearse(min(num_tokens, self.limits.max_tokens))
        self._synchronize()

    @_on_stream
    def rehearse(self, num_tokens: int) -> None:
        """Run a prefill step of so many tokens in the spare block."""
        width = blocks_for(self.limits.max_seq_len)
        starts = range(0, num_tokens, self.limits.max_seq_len)
        batch = StepBatch.ragged(
            token_ids=np.zeros(num_tokens),
            counts=np.diff([*starts, num_tokens]),
            cache_lens=np.zeros(len(starts)),
            block_tables=np.full((len(starts), width), self._model.spare_block, np.int32),
            logits_at=[num_tokens - 1],
            seats=[-1],
        )
        self._run(batch, batch.seats)

    def close(self) -> None:
        self._synchronize()
        if self._graphs is not None:
            self._graphs.clear()
        self._model.clear()
        self._sampler.clear()

    def _run(self, batch: StepBatch, seats: Ints) -> dict[str, Tensor]:
        """Fill the logits; returns the step's arrays on the device."""
        self._interrupt()
        parts = self._copier.copy(parts_of(batch, seats, self._large_tile))
        longest = int((batch.cache_lens + np.diff(batch.row_starts)).max())
        inputs, sampler = step_inputs(parts, self._large_tile, longest), self._sampler
        num_steps = sampler.feedback.num_steps
        with self._all_or_nothing():
            self._model.forward(inputs, sampler.scores, sampler.table.last_drawn, num_steps)
            sampler.num_steps += 1
        return parts

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Count a step that fails between its kernels if the device has counted it."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # a lost device answers nothing
                self._synchronize()
                self._sampler.count_as_device()
            self._interrupt()
            raise

    def _launch(self, on_device: Tensor, seats: Ints) -> None:
        """Draw at those of the last step's logits that have a seat on the device; at most these."""
        if (seats >= 0).any():
            self._sampler.launch(on_device, len(seats), self._sampler.kind(seats))

    def _pending(
        self, batch: StepBatch, seats: Ints, draw_index: Ints, on_device: Tensor | None = None
    ) -> CudaStep:
        """The step just launched. Where it is not only the device that draws, and each seat once,
        its draws are made now."""
        number = self._sampler.num_steps
        event = self._events[number % RING]
        if event is not None:
            event.record()
        drawing = seats[seats >= 0]
        self._last_ids[drawing], self._drawn_in[drawing] = _UNKNOWN, number
        step = CudaStep(self, batch, number, event)
        on_host = np.flatnonzero((batch.seats >= 0) & (seats < 0))
        if len(on_host) or draw_index.any():
            draws = self._checked_draws(step, seats, draw_index, on_device)
            step.draws = _in_order(batch.seats, draws + self._host_draws(batch, on_host))
        elif self._sampler.wants_logprobs(drawing):
            step.wait()
        return step

    def _checked_draws(
        self, step: CudaStep, seats: Ints, draw_index: Ints, on_device: Tensor | None
    ) -> list[Draw]:
        """What the device draws: first each seat once, then again where its draft was right."""
        drafts = step.batch.drafts_after(step.batch.logits_at)
        draws: list[Draw] = []
        at = np.flatnonzero((seats >= 0) & (draw_index == 0))
        while len(at):
            self._synchronize()
            drawn = self._taken(step, at)
            draws += drawn
            pairs = zip(drawn, at.tolist(), strict=True)
            right = [i + 1 for one, i in pairs if one.ok and one.token_id == drafts[i]]
            at = np.array([i for i in right if i < len(draw_index) and draw_index[i]], np.intp)
            if len(at):
                assert on_device is not None
                wave = np.full_like(seats, _NO_SEAT)
                wave[at] = seats[at]
                on_device.copy_(torch.from_numpy(wave))
                self._launch(on_device, wave)
        return draws

    def _host_draws(self, batch: StepBatch, at: NDArray[np.intp]) -> list[Draw]:
        """Of rows whose options the kernels do not know."""
        if not len(at):
            return []
        drafts = batch.drafts_after(batch.logits_at[at])
        draws = self._sampler.draw_on_host(self.logits_of(at), batch.seats[at], drafts)
        self._interrupt()
        for draw in draws:
            self._last_ids[draw.seat] = draw.token_id
        return draws

    def _with_feedback(self, batch: StepBatch, seats: Ints) -> StepBatch:
        """Ids that the row's seat drew last, written as such."""
        known = np.where(seats >= 0, self._last_ids[seats], _UNKNOWN)
        is_fed = (batch.token_ids == known) & (seats >= 0)
        return replace(batch, token_ids=np.where(is_fed, -1 - seats, batch.token_ids))

    def _interrupt(self) -> None:
        if self._graphs is not None:
            self._graphs.interrupt()

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
            self._stream.synchronize()


def _draw_indices(seats: Ints) -> Ints:
    """How many of the entries just before have the same seat; 0 where there is none."""
    draw_index = np.zeros_like(seats)
    for at in range(1, len(seats)):
        if seats[at] >= 0 and seats[at] == seats[at - 1]:
            draw_index[at] = draw_index[at - 1] + 1
    return draw_index


def _in_order(seats: Ints, draws: Sequence[Draw]) -> list[Draw]:
    """Draws in the order of the step's seats; after a rejected draft a seat has none left."""
    left: dict[int, deque[Draw]] = {}
    for draw in draws:
        left.setdefault(draw.seat, deque()).append(draw)
    return [left[seat].popleft() for seat in seats.tolist() if left.get(seat)]


def large_tile(config: GPT2Config, settings: Settings) -> int:
    """Tokens of a row that attention takes together in a prefill."""
    if settings.batch_invariant:
        return SMALL_TILE
    if settings.dtype == torch.float32:
        return 32 if config.head_dim <= 64 else SMALL_TILE
    return 128 if config.head_dim <= 64 else 64
