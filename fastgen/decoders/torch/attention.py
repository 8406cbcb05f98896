"""Attention of the torch decoder over block tables: where tokens go, and who reads what.

The cache of a layer is (2, H, slots, D): keys and values, and slot = block * 32 + offset. A row
whose blocks are neighbours reads its keys and values where they lie; otherwise its blocks are
gathered first. Rows are attended to one by one: measured on a CPU, that beats padding them into one
call (benchmarks/LOG.md), and nothing is computed that a mask would hide. Shapes: see torch_decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.decoders.interface import StepBatch


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row's share of a step: packed tokens `start` to `end`, T of them; S tokens in the cache.

    The row's cache begins at `first_slot`; `blocks` is None if its blocks are neighbours, else they
    are to be gathered. `mask`, bool (T, S), is None where every key is visible or the row is causal
    from an empty cache.
    """

    start: int
    end: int
    length: int
    first_slot: int
    blocks: Tensor | None
    mask: Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's plan, the same for every layer. `slots` (N,): where the new tokens are cached."""

    slots: Tensor
    rows: list[RowPlan]
    block_size: int
    in_float32: bool  # the products and sums of attention, whatever the dtype


def plan_attention(
    batch: StepBatch, block_size: int, device: torch.device, *, upcast: bool
) -> AttentionPlan:
    """`upcast` is the model's own wish (reorder_and_upcast_attn); on a CPU 16-bit attention is both
    slower and less exact than its conversion to float32.
    """
    counts = np.diff(batch.row_starts)  # T of each row
    row_of = np.repeat(np.arange(len(counts)), counts)  # (N,)
    offsets = np.arange(len(row_of)) - batch.row_starts[row_of]
    cached_at = batch.cache_lens[row_of] + offsets  # index of each new token in its row's cache
    blocks = batch.block_tables[row_of, cached_at // block_size].astype(np.int64)
    slots = torch.from_numpy(blocks * block_size + cached_at % block_size).to(device)
    rows = [_plan_row(batch, row, block_size, device) for row in range(len(counts))]
    return AttentionPlan(slots, rows, block_size, upcast or device.type == "cpu")


def _plan_row(batch: StepBatch, row: int, block_size: int, device: torch.device) -> RowPlan:
    start, end = batch.row_starts[row : row + 2].tolist()
    cached = int(batch.cache_lens[row])
    length = cached + end - start
    table = batch.block_tables[row, : -(-length // block_size)]
    neighbours = int(table[-1]) - int(table[0]) == len(table) - 1 and (np.diff(table) == 1).all()
    is_causal = end - start > 1 and cached == 0
    mask = None
    if end - start > 1 and cached > 0:
        visible = torch.arange(cached + 1, length + 1, device=device)[:, None]  # (T, 1)
        mask = torch.arange(length, device=device) < visible
    return RowPlan(
        start,
        end,
        length,
        first_slot=int(table[0]) * block_size,
        blocks=None if neighbours else torch.from_numpy(table.astype(np.int64)).to(device),
        mask=mask,
        is_causal=is_causal,
    )


def attend(qkv: Tensor, kv_cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Cache the new keys and values, then attend.

    Args:
        qkv: (N, 3, H, D) of the new tokens.
        kv_cache: (2, H, slots, D) of this layer, written in place.
        scale: factor on q·k.

    Returns:
        (N, C), heads side by side.
    """
    by_head = qkv.permute(1, 2, 0, 3)  # (3, H, N, D)
    kv_cache.index_copy_(2, plan.slots, by_head[1:])
    query = by_head[0].float() if plan.in_float32 else by_head[0]
    attended = [_attend_row(query, kv_cache, plan, row, scale) for row in plan.rows]
    joined = attended[0] if len(attended) == 1 else torch.cat(attended)  # (N, H, D)
    return joined.to(qkv.dtype).flatten(1)


def _attend_row(
    query: Tensor, kv_cache: Tensor, plan: AttentionPlan, row: RowPlan, scale: float
) -> Tensor:
    """(T, H, D)"""
    own = query[None, :, row.start : row.end]  # (1, H, T, D)
    if row.blocks is None:
        cached = kv_cache[:, None, :, row.first_slot : row.first_slot + row.length]
    else:
        blocks = kv_cache.view(2, len(query), -1, plan.block_size, query.shape[-1])
        cached = blocks.index_select(2, row.blocks).flatten(2, 3)[:, None, :, : row.length]
    if plan.in_float32:
        cached = cached.float()
    key, value = cached.unbind(0)  # (1, H, S, D) each
    attended = F.scaled_dot_product_attention(
        own, key, value, row.mask, is_causal=row.is_causal, scale=scale
    )
    return attended[0].transpose(0, 1)
