"""The CPU decoder: csrc/decoder/ as a Decoder. Imports neither torch nor transformers.

Weights are read one tensor at a time and packed by all cores; a step is one call into C++, draws
included, with the GIL released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.files import NUMPY_DTYPES
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.decoders.interface import Capacity, StepBatch, check_batch, with_capacity
from fastgen.decoders.memory import MemoryPlan
from fastgen.decoders.quantization import norm_smoothing, value_smoothing
from fastgen.errors import CheckpointError
from fastgen.native import native
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
        checkpoint: Checkpoint,
        shape: dict[str, Any],
        limits: Capacity,
        memory: MemoryPlan,
        *,
        num_threads: int,
    ) -> None:
        self.limits, self._memory = limits, memory
        self._no_drafts = np.full(limits.max_logits, -1, np.int32)
        self._native = native.CpuDecoder(shape, limits.num_blocks, num_threads)
        _Loader(checkpoint, self._native, shape["weights"]).load()
        self._sampler = NativeSampler(
            limits.num_seats,
            checkpoint.config.vocab_size,
            checkpoint.config.eos_token_ids,
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
        """Nothing to do: the first step is as fast as any."""

    def close(self) -> None:
        self._native.close()

    def _rows(self, batch: StepBatch) -> tuple[NDArray[np.int32], ...]:
        """A step's arrays, with what a seat drew last put in for negative ids."""
        ids = batch.token_ids
        if ids.min() < 0:
            drawn = self._sampler.last_drawn.astype(np.int32)[np.maximum(-1 - ids, 0)]
            ids = np.where(ids < 0, drawn, ids)
        return ids, batch.positions, batch.row_starts, batch.cache_lens, batch.block_tables


class _Loader:
    """Reads a checkpoint's tensors and gives them to the C++ decoder, one or two at a time."""

    def __init__(self, checkpoint: Checkpoint, decoder: Any, weights: str) -> None:
        self._checkpoint, self._native, self._weights = checkpoint, decoder, weights
        self._quantized = weights == "int8"

    def load(self) -> None:
        checkpoint = self._checkpoint
        self._native.set_positions(self._floats("wpe.weight"))
        if not checkpoint.tied:
            fits = self._native.set_embedding(_bits(checkpoint.read(EMBEDDING)))
            self._require(fits, EMBEDDING)
        for layer in range(checkpoint.config.num_layers):
            self._load_attention(layer)
            self._load_mlp(layer)
        gain, bias = self._load_norm(-1, 0, "ln_f")
        name = EMBEDDING if checkpoint.tied else HEAD
        head = checkpoint.read(name)  # (V, C)
        factors = norm_smoothing(gain, bias, head, input_axis=1) if self._quantized else None
        self._require(self._native.pack_head(_bits(head), factors), name)

    def _load_attention(self, layer: int) -> None:
        gain, bias = self._load_norm(layer, 0, f"h.{layer}.ln_1")
        qkv, qkv_bias = self._read(f"h.{layer}.attn.c_attn")
        out, out_bias = self._read(f"h.{layer}.attn.c_proj")
        qkv_factors = out_factors = None
        if self._quantized:
            values = 2 * len(out)  # they follow queries and keys
            qkv_factors = norm_smoothing(gain, bias, qkv)
            out_factors = value_smoothing(qkv[:, values:], qkv_bias[values:], out)
        self._pack(layer, 0, "attn.c_attn", qkv, qkv_bias, qkv_factors)
        self._pack(layer, 1, "attn.c_proj", out, out_bias, out_factors)

    def _load_mlp(self, layer: int) -> None:
        gain, bias = self._load_norm(layer, 1, f"h.{layer}.ln_2")
        weight, fc_bias = self._read(f"h.{layer}.mlp.c_fc")
        factors = norm_smoothing(gain, bias, weight) if self._quantized else None
        self._pack(layer, 2, "mlp.c_fc", weight, fc_bias, factors)
        self._pack(layer, 3, "mlp.c_proj", *self._read(f"h.{layer}.mlp.c_proj"), None)

    def _read(self, name: str) -> tuple[NDArray[Any], Floats]:
        return self._checkpoint.read(f"{name}.weight"), self._floats(f"{name}.bias")

    def _pack(
        self,
        layer: int,
        which: int,
        name: str,
        weight: NDArray[Any],
        bias: Floats,
        factors: Floats | None,
    ) -> None:
        fits = self._native.pack_projection(layer, which, _bits(weight), bias, factors)
        self._require(fits, f"h.{layer}.{name}.weight")

    def _load_norm(self, layer: int, which: int, name: str) -> tuple[Floats, Floats]:
        gain, bias = self._floats(f"{name}.weight"), self._floats(f"{name}.bias")
        self._native.set_norm(layer, which == 1, gain, bias)
        return gain, bias

    def _floats(self, name: str) -> Floats:
        return self._checkpoint.read(name).astype(np.float32)

    def _require(self, fits: bool, name: str) -> None:
        if not fits:
            raise CheckpointError(
                f"{self._checkpoint.name}: tensor {name} holds values too large for {self._weights}"
            )


def _bits(weight: NDArray[Any]) -> NDArray[Any]:
    """In C order; bfloat16, which NumPy has not, as its bits."""
    weight = np.ascontiguousarray(weight)
    return weight.view(np.uint16) if weight.dtype == NUMPY_DTYPES["BF16"] else weight
