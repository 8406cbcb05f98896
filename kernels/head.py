"""The head: final norm, logits, and for each tile of the vocabulary its highest logit and where.

From these the sampler knows the highest of all without reading logits again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.launch import Settings, run, wait_for_previous
from fastgen.kernels.norm import Norm
from fastgen.kernels.product import (
    choose_tile,
    num_tiles,
    prefetch_weights,
    product,
    product_arguments,
    tile_of_program,
)
from fastgen.kernels.vocabulary import TILE, store_highest
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _head(
    logits, tile_max, tile_ids, x, row_at, weight, scales, gain, norm_bias, num_rows,
    V: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TILE: tl.constexpr, NORMS: tl.constexpr, EPSILON: tl.constexpr, QUANTIZED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(num_rows, tl.cdiv(V, BN), BM)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    is_row, is_column = rows < num_rows, columns < V
    if PDL:
        prefetch_weights(weight, tl.minimum(columns, V - 1), K, BN, LINES)
    wait_for_previous(PDL)
    sources = rows
    if NORMS:
        sources = tl.load(row_at + rows, mask=is_row, other=0)
    sums = product(
        x, sources, is_row, weight, columns, is_column, scales, gain, norm_bias,
        K, BM, BN, BK, NORMS, EPSILON, QUANTIZED, DTYPE, PRECISION,
    )  # fmt: skip
    target = logits + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(target, sums, mask=is_row[:, None] & is_column[None, :])
    store_highest(tile_max, tile_ids, sums, rows, is_row, columns, V, BM, BN, TILE)


def head(
    settings: Settings,
    logits: Tensor,
    tiles: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    num_rows: int,
    norm: Norm | None = None,
    row_at: Tensor | None = None,
) -> None:
    """logits[i] = norm(x[row_at[i]]) @ weight.T; without a norm, x is normed and in order.

    Args:
        logits: float32 (L, V), written.
        tiles: float32 and int32 (L, T), written: the highest of each TILE logits (NaN if one is),
            and the lowest id that has it.
        x: float32 (N, C) with a norm, else (L, C) in the products' dtype.
        weight: (V, C); scales: (V,) of an int8 one.
        row_at: int32 (L,).
    """
    vocab_size = len(weight)
    columns = 0 if vocab_size >= 16384 and settings.dtype.itemsize == 2 else TILE
    tile = choose_tile(settings, num_rows, weight, normed=norm is not None, columns=columns)
    arguments = {
        "logits": logits,
        "tile_max": tiles[0],
        "tile_ids": tiles[1],
        "row_at": row_at,
        "V": vocab_size,
        "TILE": TILE,
        **product_arguments(settings, tile, x, weight, scales, num_rows, norm),
    }
    grid = (num_tiles(tile, num_rows, vocab_size),)
    run(_head, grid, settings, arguments, **tile.options)
