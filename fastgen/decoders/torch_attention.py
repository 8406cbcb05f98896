"""Attention of the torch decoder over block tables: where tokens go, and who reads what.

Rows with the same number of new tokens form a group and are attended to in one call, padded to the
longest of them; a mask hides the padding. Shapes: see torch_decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.decoders.interface import StepBatch


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with T new tokens each.

    `tokens` are the packed indices of their new tokens, (G * T,), or None if they are all of them
    in order. The keys and values to read are `span`, a run of neighbouring slots (one row whose
    blocks happen to be neighbours: nothing is copied), or the blocks of `tables`, (G * blocks,).
    """

    num_rows: int
    tokens: Tensor | None
    length: int  # S of the longest row
    span: tuple[int, int] | None
    tables: Tensor
    mask: Tensor | None  # additive, (G, 1, T, S); None: causal from an empty cache, or all visible
    is_causal: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's plan, the same for every layer. `slots` (N,): where the new tokens are cached."""

    slots: Tensor
    groups: list[Group]


def plan_attention(
    batch: StepBatch, block_size: int, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    counts = np.diff(batch.row_starts)  # T of each row
    row_of = np.repeat(np.arange(len(counts)), counts)  # (N,)
    offsets = np.arange(len(row_of)) - batch.row_starts[row_of]
    cached_at = batch.cache_lens[row_of] + offsets  # index of each new token in its row's cache
    blocks = batch.block_tables[row_of, cached_at // block_size].astype(np.int64)
    slots = torch.from_numpy(blocks * block_size + cached_at % block_size).to(device)
    groups = [
        _plan_group(batch, np.flatnonzero(counts == count), int(count), block_size, device, dtype)
        for count in np.unique(counts)
    ]
    return AttentionPlan(slots, groups)


def _plan_group(
    batch: StepBatch,
    rows: np.ndarray[tuple[int], np.dtype[np.intp]],
    count: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Group:
    cache_lens = batch.cache_lens[rows]
    length = int(cache_lens.max()) + count
    tables = batch.block_tables[rows, : -(-length // block_size)]
    tokens = None
    if len(rows) < len(batch.cache_lens):
        packed = batch.row_starts[rows][:, None] + np.arange(count)
        tokens = torch.from_numpy(packed.reshape(-1).astype(np.int64)).to(device)
    span = None
    if len(rows) == 1 and (np.diff(tables[0]) == 1).all():
        span = (int(tables[0, 0]) * block_size, length)
    is_causal = count > 1 and len(rows) == 1 and length == count
    mask = None
    if not is_causal and (count > 1 or (cache_lens != cache_lens[0]).any()):
        visible = cache_lens[:, None] + np.arange(count) + 1  # (G, T)
        hidden = np.arange(length) >= visible[:, None, :, None]  # (G, 1, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(torch.from_numpy(hidden).to(device), -torch.inf)
    flat = torch.from_numpy(tables.reshape(-1).astype(np.int64)).to(device)
    return Group(len(rows), tokens, length, span, flat, mask, is_causal)


def attend(
    qkv: Tensor, kv_cache: Tensor, plan: AttentionPlan, *, scale: float, upcast: bool
) -> Tensor:
    """Cache the new keys and values, then attend.

    Args:
        qkv: (N, 3, H, D) of the new tokens.
        kv_cache: (blocks, 32, 2, H, D) of this layer, written in place.
        scale: factor on q·k.
        upcast: compute in float32 whatever the dtype (reorder_and_upcast_attn).

    Returns:
        (N, C), heads side by side.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    slots = kv_cache.flatten(0, 1)  # (slots, 2, H, D)
    slots.index_copy_(0, plan.slots, qkv[:, 1:])
    out = qkv.new_empty(num_tokens, num_heads * head_dim) if len(plan.groups) > 1 else None
    for group in plan.groups:
        query = qkv[:, 0] if group.tokens is None else qkv[group.tokens, 0]  # (G * T, H, D)
        query = query.view(group.num_rows, -1, num_heads, head_dim).transpose(1, 2)  # (G, H, T, D)
        key, value = _read(kv_cache, slots, group)  # (G, H, S, D) each
        attended = _attention(query, key, value, group, scale, upcast)
        attended = attended.transpose(1, 2).reshape(-1, num_heads * head_dim)  # (G * T, C)
        if out is None:
            return attended
        out.index_copy_(0, group.tokens, attended)  # type: ignore[arg-type]  # several groups: set
    assert out is not None
    return out


def _read(kv_cache: Tensor, slots: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    if group.span is not None:
        start, length = group.span
        read = slots[start : start + length][None]
    else:
        read = kv_cache.index_select(0, group.tables)  # (G * blocks, 32, 2, H, D)
        read = read.view(group.num_rows, -1, *kv_cache.shape[2:])[:, : group.length]
    key, value = read.transpose(1, 3).unbind(2)  # (G, H, 2, S, D) -> (G, H, S, D)
    return key, value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, group: Group, scale: float, upcast: bool
) -> Tensor:
    dtype, mask = query.dtype, group.mask
    if upcast:  # nothing to do in float32: the conversions are free there
        query, key, value = query.float(), key.float(), value.float()
        mask = None if mask is None else mask.float()
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=group.is_causal, scale=scale
    )
    return attended.to(dtype)
