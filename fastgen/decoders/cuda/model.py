"""The forward pass of the CUDA decoder: which kernels run in what order, and the memory they share.

Nothing here depends on a step's values: the same sizes run the same kernels on the same memory, so
a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.cuda.weights import CudaWeights
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.kernels.attention import Spans, attention
from fastgen.kernels.embedding import embed
from fastgen.kernels.head import head
from fastgen.kernels.launch import Settings, cdiv
from fastgen.kernels.linear import activated_linear, add_linear
from fastgen.kernels.norm import Norm, layer_norm
from fastgen.kernels.processing import ProcessedLogits
from fastgen.kernels.product import MOST_NORMED_ROWS
from fastgen.kernels.qkv import qkv

SMALL_TILE = 16  # tokens of a row that attention takes together, where the step brings few
_ENDLESS = 2**30  # tokens
_SPAN = 64  # tokens; spans are multiples of it
_PROGRAMS = 4 * 132  # that fill the largest devices; more spans than that gain nothing


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens that attention takes together: of each tile the row and the first token."""

    rows: Tensor
    starts: Tensor
    count: int
    size: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device: StepBatch, row_of (N,), and its tiles for attention."""

    batch: dict[str, Tensor]
    logits_at: Tensor
    num_tokens: int
    num_logits: int
    tiles: Sequence[Tiles]
    longest: int  # tokens of a row, with what is in its cache


class CudaModel:
    """Weights, KV blocks and activations, and the forward pass on them."""

    def __init__(
        self,
        config: GPT2Config,
        weights: CudaWeights,
        settings: Settings,
        limits: Capacity,
        device: torch.device,
        *,
        int8_kv: bool,
    ) -> None:
        self.config, self.weights, self.settings, self.device = config, weights, settings, device
        self._int8_kv, self._max_seq_len = int8_kv, limits.max_seq_len
        self.kv_cache, self.kv_scales = self._new_blocks(limits.num_blocks + 1)
        tokens, width, dtype = limits.max_tokens, config.hidden_size, settings.dtype
        self._hidden = torch.empty(tokens, width, device=device)
        self._normed = torch.empty(tokens, width, dtype=dtype, device=device)
        self._query = torch.empty_like(self._normed)
        self._attended = torch.empty_like(self._normed)
        self._inner = torch.empty(tokens, config.inner_size, dtype=dtype, device=device)
        self._slots = torch.empty(tokens, dtype=torch.int32, device=device)
        self._span_room = self._new_span_room()

    @property
    def spare_block(self) -> int:
        """A spare block: padding rows write there."""
        return self.kv_cache.shape[1] - 1

    def forward(
        self, inputs: StepInputs, scores: ProcessedLogits, last_drawn: Tensor, num_steps: Tensor
    ) -> None:
        """Fill scores.logits and their tiles' maxima."""
        settings, weights, count = self.settings, self.weights, inputs.num_tokens
        embed(
            settings,
            self._hidden,
            self._slots,
            inputs.batch,
            last_drawn,
            num_steps,
            weights.embedding,
            weights.wpe,
            count,
        )
        for index in range(self.config.num_layers):
            self._layer(index, inputs)
        tiles, num_logits = (scores.tile_max, scores.tile_ids), inputs.num_logits
        x = self._hidden
        given: tuple[Any, ...] = (weights.ln_f, inputs.logits_at)
        if not self._folds_norm(num_logits):
            layer_norm(settings, self._normed, x, weights.ln_f, num_logits, inputs.logits_at)
            x, given = self._normed, ()
        head(settings, scores.logits, tiles, x, *weights.head, num_logits, *given)

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        self.kv_cache[:, destinations] = self.kv_cache[:, sources]
        if self.kv_scales is not None:
            self.kv_scales[:, destinations] = self.kv_scales[:, sources]

    def grow(self, num_blocks: int) -> None:
        """To that many and the spare one, whose place changes."""
        cache, scales = self._new_blocks(num_blocks + 1)
        old = self.kv_cache.shape[1] - 1
        cache[:, :old] = self.kv_cache[:, :old]
        if scales is not None and self.kv_scales is not None:
            scales[:, :old] = self.kv_scales[:, :old]
        self.kv_cache, self.kv_scales = cache, scales

    def clear(self) -> None:
        self.weights.clear()
        self.kv_cache, self.kv_scales = self.kv_cache.new_empty(0), None
        for name in ("_hidden", "_normed", "_query", "_attended", "_inner"):
            setattr(self, name, self.kv_cache)

    def _layer(self, index: int, inputs: StepInputs) -> None:
        settings, layer, count = self.settings, self.weights.layers[index], inputs.num_tokens
        cache = (
            self.kv_cache[index],
            None if self.kv_scales is None else self.kv_scales[index],
        )
        x, norm = self._normed_input(layer.ln_1, count)
        qkv(settings, self._query, cache, self._slots, x, layer.c_attn, count, norm)
        for tiles in inputs.tiles:
            attention(
                settings,
                self._attended,
                self._query,
                cache,
                (tiles.rows, tiles.starts, tiles.count),
                inputs.batch,
                self.config.attention_scale(index),
                tile_size=tiles.size,
                spans=self._spans(inputs, tiles),
            )
        add_linear(settings, self._hidden, self._attended, layer.c_proj, count)
        x, norm = self._normed_input(layer.ln_2, count)
        activated_linear(settings, self._inner, x, layer.c_fc, self.config.activation, count, norm)
        add_linear(settings, self._hidden, self._inner, layer.mlp_proj, count)

    def _normed_input(self, norm: Norm, count: int) -> tuple[Tensor, Norm | None]:
        """The input of a product after a norm, and the norm if the product applies it itself."""
        if self._folds_norm(count):
            return self._hidden, norm
        layer_norm(self.settings, self._normed, self._hidden, norm, count)
        return self._normed, None

    def _folds_norm(self, num_rows: int) -> bool:
        return num_rows <= MOST_NORMED_ROWS and not self.settings.batch_invariant

    def _spans(self, inputs: StepInputs, tiles: Tiles) -> Spans:
        """Enough spans to fill the device, where tokens are few; one with many tokens, in
        batch-invariant mode, and for rows longer than the context (the drop-in has some)."""
        heads, longest = self.config.num_heads, self._max_seq_len
        one = Spans(_ENDLESS, 1)
        is_long = inputs.longest > longest
        if tiles.size > SMALL_TILE or self.settings.batch_invariant or is_long:
            return one
        wanted = cdiv(_PROGRAMS, inputs.num_tokens * heads)
        length = cdiv(cdiv(longest, wanted), _SPAN) * _SPAN
        count = cdiv(longest, length)
        return Spans(length, count, *self._span_room) if count > 1 else one

    def _new_span_room(self) -> tuple[Tensor, ...]:
        """With more than one span there are fewer tokens x heads than programs, so that spans x
        tokens x heads stay below twice as many."""
        most = 2 * max(_PROGRAMS, cdiv(self._max_seq_len, _SPAN) * self.config.num_heads)
        return (
            torch.empty(most, self.config.head_dim, device=self.device),
            torch.empty(most, device=self.device),
            torch.empty(most, device=self.device),
            torch.zeros(_PROGRAMS, dtype=torch.int32, device=self.device),
        )

    def _new_blocks(self, num_blocks: int) -> tuple[Tensor, Tensor | None]:
        """(layers, blocks, 2, H, 32, D), and scales without the last dimension for int8."""
        config = self.config
        shape = (config.num_layers, num_blocks, 2, config.num_heads, BLOCK_SIZE)
        dtype = torch.int8 if self._int8_kv else self.settings.dtype
        cache = torch.zeros(*shape, config.head_dim, dtype=dtype, device=self.device)
        scales = torch.zeros(shape, device=self.device) if self._int8_kv else None
        return cache, scales
