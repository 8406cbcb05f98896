"""Attention of the new tokens over their rows' KV blocks, causal, with online softmax.

A program takes up to BM neighbouring tokens of one row, one head and one span of the cache. New
keys and values have been written into the blocks before, so a cached prefix and the tokens of this
step are read alike, and one kernel serves decode (one token a row), drafts, prefill and its chunks.

Decode cuts long caches into spans (Flash-Decoding: Dao, Haziza, Massa, Sizov 2023), so that few
rows fill the device; whichever program of a token tile and head comes last joins what all found.

Online softmax: Milakov and Gimelshein 2018; tiles of queries: FlashAttention-2, Dao 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastgen.kernels.embedding import BLOCK_SIZE
from fastgen.kernels.launch import Settings, power_of_two, run, wait_for_previous
from fastgen.kernels.qkv import KvCache
from torch import Tensor

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Spans:
    """How caches are cut, and where programs leave what they found.

    Attributes:
        length: tokens of a span, a multiple of 64.
        count: spans of the longest row; 1: nothing is cut, and the rest is not used.
        sums: float32 (N, H, count, D); maxima and totals: float32 (N, H, count).
        arrived: int32 (tiles, H), zero before and after.
    """

    length: int
    count: int
    sums: Tensor | None = None
    maxima: Tensor | None = None
    totals: Tensor | None = None
    arrived: Tensor | None = None


@triton.jit
def _attend_tile(
    q, position, best, total, sums, keys, values, key_scales, value_scales, table, start, end, head,
    scale,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKS: tl.constexpr,
    QUANTIZED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take BN tokens of the cache along, from `start`; only what stands before `end` is there."""
    token = start + tl.arange(0, BN)
    dim = tl.arange(0, BD)
    there = token < end if MASKS else token >= 0
    block = tl.load(table + token // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    place = (block * (2 * H) + head) * BLOCK_SIZE + token % BLOCK_SIZE  # of keys; values: + H * 32
    inside = there[:, None] & (dim < D)[None, :]
    k = tl.load(keys + place[:, None] * D + dim[None, :], mask=inside, other=0).to(DTYPE)
    v = tl.load(values + place[:, None] * D + dim[None, :], mask=inside, other=0).to(DTYPE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BM, BN)
    if QUANTIZED:
        scores *= tl.load(key_scales + place, mask=there, other=0.0)[None, :]
        value_scale = tl.load(value_scales + place, mask=there, other=0.0)
    if MASKS:
        # A weight of zero must hide a later token even where its value is NaN or infinite: such
        # values count as zero, and whoever sees them gets NaN by the score instead.
        is_finite = tl.abs(v.to(tl.float32)) < float("inf")
        v = tl.where(is_finite, v, 0.0)
        is_whole = tl.min(is_finite.to(tl.int32), 1) > 0  # (BN,)
        if QUANTIZED:
            is_whole = is_whole & (value_scale < float("inf"))
            value_scale = tl.where(is_whole, value_scale, 0.0)
        scores = tl.where(is_whole[None, :], scores, float("nan"))
        seen = there[None, :] & (token[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    reference = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(best - reference)
    total = total * shrink + tl.sum(weights, 1)
    if QUANTIZED:
        weights = weights * value_scale[None, :]
    sums = sums * shrink[:, None]
    sums = tl.dot(weights.to(DTYPE), v, sums, input_precision=PRECISION)
    return highest, total, sums


@triton.jit
def _join(
    out, query_at, count, head, num_spans, span_sums, span_maxima, span_totals,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPANS: tl.constexpr, BS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """out of `count` tokens from what their first `num_spans` spans found."""
    span, dim = tl.arange(0, BS), tl.arange(0, BD)
    there = span < num_spans
    for index in range(0, count):
        token = (query_at + index).to(tl.int64)
        at = (token * H + head) * SPANS + span
        highest = tl.load(span_maxima + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(span_totals + at, mask=there, other=0.0, cache_modifier=".cg")
        inside = there[:, None] & (dim < D)[None, :]
        place = at[:, None] * D + dim[None, :]
        sums = tl.load(span_sums + place, mask=inside, other=0.0, cache_modifier=".cg")
        best = tl.max(highest, 0)
        weights = tl.where(there & (highest != float("-inf")), tl.exp2(highest - best), 0.0)
        joined = tl.sum(sums * weights[:, None], 0) / tl.sum(total * weights, 0)
        target = out + (token * H + head) * D + dim
        tl.store(target, joined.to(DTYPE), mask=dim < D)


@triton.jit(do_not_specialize=["table_width", "span_length"])
def _attention(
    out, query, kv_cache, kv_scales, tile_rows, tile_starts, row_starts, cache_lens, block_tables,
    span_sums, span_maxima, span_totals, arrived, table_width, span_length, scale,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPANS: tl.constexpr, BS: tl.constexpr, QUANTIZED: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    tile, head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tile_rows + tile)
    query_at = tl.load(tile_starts + tile)  # packed index of the tile's first token
    row_start, row_end = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    count = tl.minimum(row_end - query_at, BM)
    first = tl.load(cache_lens + row) + query_at - row_start  # the first token's place in its row
    length = first + count  # what the tile's last token sees
    begin = span * span_length
    end = tl.minimum(length, begin + span_length)
    if begin < length:
        m, dim = tl.arange(0, BM), tl.arange(0, BD)
        place = ((query_at + m).to(tl.int64)[:, None] * H + head) * D + dim[None, :]
        inside = (m < count)[:, None] & (dim < D)[None, :]
        q = tl.load(query + place, mask=inside, other=0.0)
        best = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, BD], tl.float32)
        values = kv_cache + H * BLOCK_SIZE * D
        value_scales = kv_scales + H * BLOCK_SIZE if QUANTIZED else None
        table = block_tables + row * table_width
        everywhere = tl.minimum(end, first + 1) // BN * BN  # before this, all tokens see all
        for start in range(begin, tl.maximum(everywhere, begin), BN):
            best, total, sums = _attend_tile(
                q, first + m, best, total, sums, kv_cache, values, kv_scales, value_scales, table,
                start, end, head, scale, H, D, BD, BN, False, QUANTIZED, DTYPE, PRECISION,
            )  # fmt: skip
        for start in range(tl.maximum(everywhere, begin), end, BN):
            best, total, sums = _attend_tile(
                q, first + m, best, total, sums, kv_cache, values, kv_scales, value_scales, table,
                start, end, head, scale, H, D, BD, BN, True, QUANTIZED, DTYPE, PRECISION,
            )  # fmt: skip
        if SPANS == 1:
            tl.store(out + place, (sums / total[:, None]).to(DTYPE), mask=inside)
        else:
            at = ((query_at + m).to(tl.int64) * H + head) * SPANS + span
            tl.store(span_maxima + at, best, mask=m < count)
            tl.store(span_totals + at, total, mask=m < count)
            tl.store(span_sums + at[:, None] * D + dim[None, :], sums, mask=inside)
            num_spans = tl.cdiv(length, span_length)
            tl.debug_barrier()  # all of this program's stores, before its arrival
            counter = arrived + tile * H + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_spans - 1:
                tl.store(counter, 0)
                _join(
                    out, query_at, count, head, num_spans, span_sums, span_maxima, span_totals,
                    H, D, BD, SPANS, BS, DTYPE,
                )  # fmt: skip


def attention(
    settings: Settings,
    out: Tensor,
    query: Tensor,
    kv_cache: KvCache,
    tiles: tuple[Tensor, Tensor, int],
    batch: dict[str, Tensor],
    scale: float,
    *,
    tile_size: int,
    spans: Spans,
) -> None:
    """out = softmax(query @ keys.T * scale) @ values, each token over its row up to itself.

    Args:
        out, query: (N, C), heads side by side, in the products' dtype; out is written.
        kv_cache: of this layer: (blocks, 2, H, 32, D), and scales of an int8 one.
        tiles: int32 (T,) the row of each tile of tokens, int32 (T,) the packed index of its first
            token, and T.
        batch: int32 row_starts (R + 1,), cache_lens (R,), block_tables (R, M).
        tile_size: tokens of a tile at most, a power of two, at least 16.
    """
    blocks, scales = kv_cache
    heads, head_dim = blocks.shape[2], blocks.shape[4]
    tile_rows, tile_starts, num_tiles = tiles
    padded = power_of_two(head_dim, 16)
    is_wide = settings.dtype.itemsize == 4  # no tensor cores: registers hold the operands
    columns = 16 if is_wide else 64
    arguments: dict[str, Any] = {
        "out": out,
        "query": query,
        "kv_cache": blocks,
        "kv_scales": scales,
        "tile_rows": tile_rows,
        "tile_starts": tile_starts,
        **{name: batch[name] for name in ("row_starts", "cache_lens", "block_tables")},
        "span_sums": spans.sums,
        "span_maxima": spans.maxima,
        "span_totals": spans.totals,
        "arrived": spans.arrived,
        "table_width": batch["block_tables"].shape[1],
        "span_length": spans.length,
        "scale": scale * LOG2_E,
        "H": heads,
        "D": head_dim,
        "BD": padded,
        "BM": tile_size,
        "BN": columns,
        "SPANS": spans.count,
        "BS": power_of_two(spans.count),
        "QUANTIZED": scales is not None,
        **settings.product,
    }
    grid = (num_tiles, heads, spans.count)
    num_warps = 8 if is_wide or tile_size == 128 or scales is not None else 4
    num_stages = 3 if scales is None else 2
    run(_attention, grid, settings, arguments, num_warps=num_warps, num_stages=num_stages)
