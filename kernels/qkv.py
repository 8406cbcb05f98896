"""Queries, keys and values of the new tokens: norm, product, bias, and the write into KV blocks.

A layer's cache is (blocks, 2, H, 32, D): keys and values of a block and head are one piece. int8
caches have a float32 scale for each token and head, (blocks, 2, H, 32); a program then makes whole
heads, so that it knows their largest value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.embedding import BLOCK_SIZE
from fastgen.kernels.launch import Settings, cdiv, power_of_two, run, wait_for_previous
from fastgen.kernels.linear import Linear
from fastgen.kernels.norm import Norm
from fastgen.kernels.product import (
    choose_tile,
    prefetch_weights,
    product,
    product_arguments,
    tile_of_program,
)
from torch import Tensor

KvCache = tuple[Tensor, Tensor | None]  # of one layer; int8 ones have scales


@triton.jit
def _to_int8(values, inside):
    """values (BM, BN), a scale for each row: int8 ones, and scales (BM,), NaN if a value is."""
    magnitudes = tl.where(inside, tl.abs(values), 0.0)
    largest = tl.max(magnitudes, 1)
    scale = tl.where(tl.max((magnitudes != magnitudes).to(tl.int32), 1) > 0, float("nan"), largest)
    scale = scale / 127.0
    inverse = tl.where(largest > 0.0, 127.0 / largest, 0.0)
    whole = tl.floor(values * inverse[:, None] + 0.5)
    return tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8), scale


@triton.jit(do_not_specialize=["num_rows"])
def _qkv(
    query, kv_cache, kv_scales, slots, x, weight, scales, linear_bias, gain, norm_bias, num_rows,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BY_HEAD: tl.constexpr, NORMS: tl.constexpr, EPSILON: tl.constexpr,
    QUANTIZED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if BY_HEAD:
        row_tile, column_tile = tile_of_program(num_rows, 3 * H, BM)
        dim = tl.arange(0, BN)
        columns, is_column = column_tile * D + dim, dim < D
    else:
        row_tile, column_tile = tile_of_program(num_rows, tl.cdiv(3 * H * D, BN), BM)
        columns = column_tile * BN + tl.arange(0, BN)
        is_column = columns < 3 * H * D
    rows = row_tile * BM + tl.arange(0, BM)
    is_row = rows < num_rows
    if PDL:
        prefetch_weights(weight, tl.minimum(columns, 3 * H * D - 1), K, BN, LINES)
    wait_for_previous(PDL)
    sums = product(
        x, rows, is_row, weight, columns, is_column, scales, gain, norm_bias,
        K, BM, BN, BK, NORMS, EPSILON, QUANTIZED, DTYPE, PRECISION,
    )  # fmt: skip
    sums += tl.load(linear_bias + columns, mask=is_column, other=0.0)[None, :]

    which = columns // (H * D)  # 0 for queries, 1 for keys, 2 for values
    head, dim = columns % (H * D) // D, columns % D
    inside = is_row[:, None] & is_column[None, :]
    target = rows.to(tl.int64)[:, None] * (H * D) + (columns % (H * D))[None, :]
    tl.store(query + target, sums.to(DTYPE), mask=inside & (which == 0)[None, :])

    slot = tl.load(slots + rows, mask=is_row, other=0).to(tl.int64)
    is_cached = inside & (which > 0)[None, :]
    piece = (slot // BLOCK_SIZE * 2)[:, None] + (which - 1)[None, :]
    place = (piece * H + head[None, :]) * BLOCK_SIZE + (slot % BLOCK_SIZE)[:, None]
    target = kv_cache + place * D + dim[None, :]
    if BY_HEAD:
        values, scale = _to_int8(sums, inside)
        tl.store(target, values, mask=is_cached)
        place = ((slot // BLOCK_SIZE * 2 + column_tile // H - 1) * H + column_tile % H) * BLOCK_SIZE
        if column_tile >= H:
            tl.store(kv_scales + place + slot % BLOCK_SIZE, scale, mask=is_row)
    else:
        tl.store(target, sums.to(DTYPE), mask=is_cached)


def qkv(
    settings: Settings,
    query: Tensor,
    kv_cache: KvCache,
    slots: Tensor,
    x: Tensor,
    linear: Linear,
    num_rows: int,
    norm: Norm | None = None,
) -> None:
    """Write queries, and keys and values where `slots` says.

    Args:
        query: (N, C), written, in the products' dtype.
        kv_cache: of this layer, written; in the products' dtype, or int8 with scales.
        slots: int32 (N,), block * 32 + offset.
        x: (N, C) in the products' dtype; float32 with a norm.
        linear: attn.c_attn.
    """
    weight, scales, bias = linear
    blocks, kv_scales = kv_cache
    heads, head_dim = blocks.shape[2], blocks.shape[4]
    columns = 0 if kv_scales is None else power_of_two(head_dim, 8)  # whole heads
    tile = choose_tile(settings, num_rows, weight, normed=norm is not None, columns=columns)
    column_tiles = cdiv(len(weight), tile.columns) if kv_scales is None else 3 * heads
    arguments = {
        "query": query,
        "kv_cache": blocks,
        "kv_scales": kv_scales,
        "slots": slots,
        "linear_bias": bias,
        "H": heads,
        "D": head_dim,
        "BY_HEAD": kv_scales is not None,
        **product_arguments(settings, tile, x, weight, scales, num_rows, norm),
    }
    grid = (cdiv(num_rows, tile.rows) * column_tiles,)
    run(_qkv, grid, settings, arguments, **tile.options)
