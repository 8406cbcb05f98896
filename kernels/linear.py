"""Linear layers of a block: FC1 with norm and activation; attn.c_proj and FC2 with the residual.

out    = activation(norm(x) @ weight.T + bias)
hidden = hidden + x @ weight.T + bias
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.activations import activated
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
from torch import Tensor

Linear = tuple[Tensor, Tensor | None, Tensor]  # weight (out, in), its int8 scales, bias (out,)


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    out, x, weight, scales, linear_bias, gain, norm_bias, num_rows,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORMS: tl.constexpr, EPSILON: tl.constexpr, ACTIVATION: tl.constexpr, ADDS: tl.constexpr,
    QUANTIZED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of_program(num_rows, tl.cdiv(N, BN), BM)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    is_row, is_column = rows < num_rows, columns < N
    if PDL:
        prefetch_weights(weight, tl.minimum(columns, N - 1), K, BN, LINES)
    wait_for_previous(PDL)
    sums = product(
        x, rows, is_row, weight, columns, is_column, scales, gain, norm_bias,
        K, BM, BN, BK, NORMS, EPSILON, QUANTIZED, DTYPE, PRECISION,
    )  # fmt: skip
    sums += tl.load(linear_bias + columns, mask=is_column, other=0.0)[None, :]
    target = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if ADDS:
        sums += tl.load(target, mask=inside, other=0.0)
        tl.store(target, sums, mask=inside)
    else:
        tl.store(target, activated(sums, ACTIVATION).to(DTYPE), mask=inside)


def activated_linear(
    settings: Settings,
    out: Tensor,
    x: Tensor,
    linear: Linear,
    activation: str,
    num_rows: int,
    norm: Norm | None = None,
) -> None:
    """out = activation(x @ weight.T + bias), with norm(x) for x if there is one.

    Args:
        out: (N, I), written, in the products' dtype.
        x: (N, C) in the products' dtype; float32 with a norm.
    """
    _run(settings, out, x, linear, num_rows, norm, activation)


def add_linear(
    settings: Settings, hidden: Tensor, x: Tensor, linear: Linear, num_rows: int
) -> None:
    """hidden += x @ weight.T + bias; hidden is float32 (N, C), x (N, K) in the products' dtype."""
    _run(settings, hidden, x, linear, num_rows, None, None)


def _run(
    settings: Settings,
    out: Tensor,
    x: Tensor,
    linear: Linear,
    num_rows: int,
    norm: Norm | None,
    activation: str | None,
) -> None:
    weight, scales, bias = linear
    tile = choose_tile(settings, num_rows, weight, normed=norm is not None)
    num_columns = len(weight)
    arguments = {
        "out": out,
        "linear_bias": bias,
        "N": num_columns,
        "ACTIVATION": activation,
        "ADDS": activation is None,
        **product_arguments(settings, tile, x, weight, scales, num_rows, norm),
    }
    grid = (num_tiles(tile, num_rows, num_columns),)
    run(_linear, grid, settings, arguments, **tile.options)
