"""The pure-PyTorch decoder: every GPT-2 variant, device and dtype; the reference for the others.

Shape legend: N new tokens of a step, packed; T new tokens of one row, S with those in its cache;
H heads, D head_dim, C = H * D hidden, I inner size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.interface import Capacity, StepBatch, check_batch, with_capacity
from fastgen.decoders.machine import granted_cores
from fastgen.decoders.memory import MemoryPlan
from fastgen.decoders.torch.attention import AttentionPlan, attend, plan_attention
from fastgen.decoders.torch.weights import ACTIVATIONS, Layer, Weights
from fastgen.native import native
from fastgen.sampling.draw import Draw
from fastgen.sampling.native_sampler import NativeSampler
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.torch_sampler import TorchSampler


@dataclass(slots=True)
class TorchStep:
    """A step that has been made: PyTorch's own order of work does the waiting."""

    draws: list[Draw]
    _logits: Tensor
    _drawn_logits: Tensor
    is_async: ClassVar[bool] = False

    def wait(self) -> list[Draw]:
        return self.draws

    @property
    def logits(self) -> NDArray[np.float32]:
        host: NDArray[np.float32] = self._logits.cpu().numpy()
        return host

    @property
    def drawn_logits(self) -> NDArray[np.float32]:
        host: NDArray[np.float32] = self._drawn_logits.cpu().numpy()
        return host


class TorchDecoder:
    """See fastgen.decoders.interface.Decoder."""

    survives_fork: ClassVar[bool] = False  # PyTorch would wait there for its parent's threads

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        limits: Capacity,
        memory: MemoryPlan,
        *,
        num_threads: int | None = None,
    ) -> None:
        self.config, self.limits = config, limits
        self._weights, self._memory, self._num_threads = weights, memory, num_threads
        self._activation = ACTIVATIONS[config.activation]
        self._kv_cache = self._new_blocks(limits.num_blocks)  # (layers, 2, H, slots, D)
        self._sampler = _make_sampler(config, limits, weights.device, num_threads)
        self.known_options = self._sampler.known_options

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        check_batch(batch, self.limits)
        with _threads(self._num_threads):
            hidden = self._hidden(batch)  # (N, C)
            wanted = hidden[self._tensor(batch.logits_at)]  # (L, C)
            wanted = self._norm(wanted, *self._weights.ln_f)
            return self._weights.head(wanted).float()  # (L, V)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> TorchStep:
        logits = self.forward(batch)
        draws = batch.seats >= 0
        if not draws.any():
            return TorchStep([], logits, logits[:0])
        if draws.all():
            return TorchStep(self._draw(logits, batch, draws), logits[:0], logits)
        drawn = logits[self._tensor(np.flatnonzero(draws))]
        others = logits[self._tensor(np.flatnonzero(~draws))]
        return TorchStep(self._draw(drawn, batch, draws), others, drawn)

    def bind(self, seat: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        self._sampler.bind(seat, params, token_ids)

    def observe(self, seat: int, token_id: int) -> None:
        self._sampler.observe(seat, token_id)

    def release(self, seat: int) -> None:
        self._sampler.release(seat)

    def set_mask(self, seat: int, allowed: NDArray[np.bool_] | None) -> None:
        self._sampler.set_mask(seat, allowed)

    @torch.inference_mode()
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        sources, destinations = self._tensor(np.array(pairs, dtype=np.int64)).unbind(1)
        layers, _, heads, _, head_dim = self._kv_cache.shape
        blocks = self._kv_cache.view(layers, 2, heads, -1, self.limits.block_size, head_dim)
        blocks[:, :, :, destinations] = blocks[:, :, :, sources]

    @torch.inference_mode()
    def reserve(self, blocks: int, seats: int) -> None:
        before, limits = self.limits, with_capacity(self.limits, blocks, seats)
        if blocks > before.num_blocks:
            more = self._new_blocks(blocks - before.num_blocks)
            self._kv_cache = torch.cat([self._kv_cache, more], dim=3)
        if seats > before.num_seats:
            self._sampler.reserve(seats)
        self.limits = limits
        self._memory = replace(
            self._memory,
            num_blocks=limits.num_blocks,
            kv_cache=self._kv_cache.numel() * self._kv_cache.itemsize,
        )

    def memory(self) -> MemoryPlan:
        return self._memory

    def warmup(self) -> None:
        """Nothing to do: PyTorch's first step is as fast as any."""

    def close(self) -> None:
        self._weights.clear()
        self._kv_cache = self._kv_cache.new_empty(0)

    def _hidden(self, batch: StepBatch) -> Tensor:
        token_ids = self._token_ids(batch.token_ids)  # (N,)
        hidden = F.embedding(token_ids, self._weights.wte)
        hidden = hidden + F.embedding(self._tensor(batch.positions), self._weights.wpe)  # (N, C)
        upcast = self.config.reorder_and_upcast_attn
        plan = plan_attention(batch, self.limits.block_size, hidden.device, upcast=upcast)
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attention(self._norm(hidden, *layer.ln_1), plan, index, layer)
            hidden = hidden + self._mlp(self._norm(hidden, *layer.ln_2), layer)
        return hidden

    def _attention(self, x: Tensor, plan: AttentionPlan, index: int, layer: Layer) -> Tensor:
        config = self.config
        qkv = layer.c_attn(x).view(len(x), 3, config.num_heads, config.head_dim)
        scale = config.attention_scale(index)
        attended = attend(qkv, self._kv_cache[index], plan, scale)
        return layer.c_proj(attended)  # (N, C)

    def _mlp(self, x: Tensor, layer: Layer) -> Tensor:
        return layer.mlp_proj(self._activation(layer.c_fc(x)))  # (N, C) -> (N, I) -> (N, C)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.layer_norm_epsilon)

    def _token_ids(self, token_ids: NDArray[np.int32]) -> Tensor:
        """Ids (N,), with those that a seat drew last put in for the negative ones."""
        ids = self._tensor(token_ids)
        if token_ids.min() >= 0:
            return ids
        drawn = torch.as_tensor(self._sampler.last_drawn).to(ids.device)
        return torch.where(ids < 0, drawn[(-1 - ids).clamp_min(0)], ids)

    def _draw(self, logits: Tensor, batch: StepBatch, draws: NDArray[np.bool_]) -> list[Draw]:
        drafts = batch.drafts_after(batch.logits_at[draws])
        if isinstance(self._sampler, TorchSampler):
            logits = logits.to(self._sampler.device)
        return self._sampler.draw(logits, batch.seats[draws], drafts.tolist())

    def _tensor(self, values: NDArray[np.integer[Any]]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._weights.device)

    def _new_blocks(self, num_blocks: int) -> Tensor:
        config = self.config
        slots = num_blocks * self.limits.block_size
        shape = (config.num_layers, 2, config.num_heads, slots, config.head_dim)
        return torch.zeros(shape, dtype=self._weights.dtype, device=self._weights.device)


def _make_sampler(
    config: GPT2Config, limits: Capacity, device: torch.device, num_threads: int | None
) -> NativeSampler | TorchSampler:
    """The C++ one for logits in the host's memory. The torch one needs float64: where the device
    has none (Apple's), it draws on the CPU."""
    sizes = (limits.num_seats, config.vocab_size, frozenset(config.eos_token_ids))
    if native is not None and device.type == "cpu":
        return NativeSampler(*sizes, limits.max_seq_len, num_threads or granted_cores())
    return TorchSampler(*sizes, torch.device("cpu") if device.type == "mps" else device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch's thread count is the process's: change it for one call only, and only if asked."""
    if count is None or count == torch.get_num_threads():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
