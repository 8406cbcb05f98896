"""The matrix product that linear layers and the head share, and which tiles it is made of.

A program computes BM rows by BN columns of x @ weight.T. Few rows are padded to the 16 that tensor
cores take: such a step waits for the weights anyway. The layer norm before a product is folded into
it for few rows (norm.py says when not).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from fastgen.kernels.launch import Settings, cdiv, power_of_two, prefetch
from fastgen.kernels.norm import Norm, row_statistics
from torch import Tensor

MOST_NORMED_ROWS = 64  # with more, the norm is a kernel of its own
# Row tiles that take turns with column tiles, so that both stay in the cache
_GROUP = tl.constexpr(8)
_LINE = 128  # bytes of a cache line
_WIDE = 16384  # columns: only a vocabulary has so many


@dataclass(frozen=True, slots=True)
class Tile:
    """BM rows by BN columns by BK inputs a step, and how Triton is to compile them."""

    rows: int
    columns: int
    inputs: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def constants(self, num_inputs: int) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.inputs, "K": num_inputs}


def choose_tile(
    settings: Settings, num_rows: int, weight: Tensor, *, normed: bool, columns: int = 0
) -> Tile:
    """For x (num_rows, K) times weight (N, K); the same for every number of rows if invariant.

    Args:
        normed: x is float32, and its norm is taken in the product.
        columns: of a tile, where the kernel needs so many.
    """
    num_columns, num_inputs = weight.shape
    is_wide = num_columns >= _WIDE
    if settings.dtype == torch.float32:  # no tensor cores: small tiles, and registers for sums
        many = num_rows > 64 and not settings.batch_invariant
        tile = Tile(32, 64, 32, 4, 4) if many else Tile(16, 32, 64, 4, 3)
    elif settings.batch_invariant:
        tile = Tile(64, 64, 64, 4, 4)
    elif num_rows <= 16:  # all weights pass by once: many programs with much under way
        narrow = 8 if num_columns < 2048 else 16
        tile = Tile(16, 64 if is_wide else narrow, 256, 4, 4 if normed else 6)
    elif num_rows <= 64:
        tile = Tile(64, 128 if is_wide else 32, 128, 4, 4)
    elif num_rows <= 512:
        tile = Tile(64, 128 if is_wide else 64, 64, 4, 4)
        if num_columns < 2048:  # else there are fewer programs than processors
            tile = Tile(64, 32, 128, 4, 4)
    else:
        tile = Tile(128, 128, 64, 8, 4)
    if columns:
        rows = min(tile.rows, 64 if columns < 128 or settings.dtype.itemsize == 2 else 16)
        inputs = min(tile.inputs, 256 if rows == 16 else 64)
        tile = replace(tile, rows=rows, columns=columns, inputs=inputs)
    if tile.rows * tile.columns >= 64 * 128 or columns * settings.dtype.itemsize >= 512:
        tile = replace(tile, num_warps=8)
    tile = replace(tile, inputs=min(tile.inputs, power_of_two(num_inputs, 16)))
    size = settings.dtype.itemsize
    sizes = (4 if normed else size, weight.element_size(), size)
    return _fitted(tile, *sizes, settings.shared_memory)


def _fitted(tile: Tile, x_size: int, weight_size: int, operand_size: int, room: int) -> Tile:
    """With so few inputs, then stages, that shared memory holds them. Sizes are in bytes."""
    while True:
        step = tile.inputs * (tile.rows * x_size + tile.columns * weight_size)
        operands = tile.inputs * (tile.rows + tile.columns) * operand_size
        if (tile.num_stages - 1) * step + operands <= room:
            return tile
        if tile.inputs > 64:
            tile = replace(tile, inputs=tile.inputs // 2)
        else:
            tile = replace(tile, num_stages=tile.num_stages - 1)


def num_tiles(tile: Tile, num_rows: int, num_columns: int) -> int:
    return cdiv(num_rows, tile.rows) * cdiv(num_columns, tile.columns)


def product_arguments(
    settings: Settings,
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    num_rows: int,
    norm: Norm | None,
) -> dict[str, Any]:
    """What every kernel that multiplies x with weight is told."""
    gain, norm_bias, epsilon = norm or (None, None, 0.0)
    row_bytes = weight.shape[1] * weight.element_size()
    return {
        "x": x,
        "weight": weight,
        "scales": scales,
        "gain": gain,
        "norm_bias": norm_bias,
        "num_rows": num_rows,
        "NORMS": norm is not None,
        "EPSILON": epsilon,
        "QUANTIZED": scales is not None,
        "LINES": power_of_two(cdiv(row_bytes, _LINE)),
        **tile.constants(weight.shape[1]),
        **settings.product,
    }


@triton.jit
def tile_of_program(num_rows, num_column_tiles, BM: tl.constexpr):
    """Row and column tile of this program; _GROUP row tiles by all column tiles at a time."""
    program = tl.program_id(0)
    num_row_tiles = tl.cdiv(num_rows, BM)
    first = program // (_GROUP * num_column_tiles) * _GROUP
    size = tl.minimum(num_row_tiles - first, _GROUP)
    within = program % (_GROUP * num_column_tiles)
    return first + within % size, within // size


@triton.jit
def prefetch_weights(weight, columns, K: tl.constexpr, BN: tl.constexpr, LINES: tl.constexpr):
    """Ask for the rows of weight (N, K) that this program will read; LINES is a power of two."""
    step: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.minimum(tl.arange(0, LINES) * step, K - 1)
    prefetch(weight + columns.to(tl.int64)[:, None] * K + k[None, :])


@triton.jit
def product(
    x, rows, is_row, weight, columns, is_column, scales, gain, bias,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORMS: tl.constexpr,
    EPSILON: tl.constexpr, QUANTIZED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[rows] @ weight[columns].T, float32 (BM, BN); zero outside `is_row` and `is_column`.

    With NORMS, x is the float32 residual stream, and its norm (gain and bias, EPSILON) is taken.
    """
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    if NORMS:
        mean, deviation = row_statistics(x, rows, is_row, EPSILON, K, BK, BM)
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if K % BK == 0:
            x_mask, weight_mask = is_row[:, None], is_column[None, :]
        else:
            x_mask = is_row[:, None] & (k < K)[None, :]
            weight_mask = is_column[None, :] & (k < K)[:, None]
        own = tl.load(x + rows[:, None] * K + k[None, :], mask=x_mask, other=0.0)
        if NORMS:
            own = (own - mean[:, None]) * deviation[:, None]
            own = own * tl.load(gain + k, mask=k < K, other=0.0)[None, :]
            own = own + tl.load(bias + k, mask=k < K, other=0.0)[None, :]
        panel = tl.load(weight + columns[None, :] * K + k[:, None], mask=weight_mask, other=0)
        sums = tl.dot(own.to(DTYPE), panel.to(DTYPE), sums, input_precision=PRECISION)
    if QUANTIZED:
        sums = sums * tl.load(scales + columns, mask=is_column, other=0.0)[None, :]
    return sums
