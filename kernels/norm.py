"""Layer norm: its statistics, which kernels for few tokens take along, and a kernel for many.

With many tokens, every column tile of a product would compute a row's norm again; then it is made
once, and kept in the dtype of the product's operands.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastgen.kernels.launch import Settings, power_of_two, run, wait_for_previous
from torch import Tensor

_CHUNK = 1024
Norm = tuple[Tensor, Tensor, float]  # gain and bias, float32 (C,) each, and epsilon


@triton.jit
def row_statistics(
    x, rows, is_row, EPSILON: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr
):
    """Mean and 1 / deviation, float32 (BM,), of `rows` of x, float32 (., K).

    Each chunk's mean and squares are computed by themselves and joined (Chan, Golub and LeVeque
    1979): one pass over memory without the cancellation of sums of squares.
    """
    mean = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in tl.static_range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = is_row[:, None] & (k < K)[None, :]
        values = tl.load(x + rows[:, None] * K + k[None, :], mask=inside, other=0.0)
        count = min(CHUNK, K - start)
        own_mean = tl.sum(values, 1) / count
        centred = tl.where(inside, values - own_mean[:, None], 0.0)
        gap = own_mean - mean
        mean += gap * (count / (start + count))
        squares += tl.sum(centred * centred, 1) + gap * gap * (start * count / (start + count))
    return mean, tl.rsqrt(squares / K + EPSILON)


@triton.jit
def _layer_norm(
    out, x, row_at, gain, bias,
    EPSILON: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, GATHERS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0) + tl.arange(0, 1)  # (1,)
    source = tl.load(row_at + row) if GATHERS else row
    source = source.to(tl.int64)
    mean, scale = row_statistics(x, source, row >= 0, EPSILON, C, CHUNK, 1)
    for start in tl.static_range(0, C, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = (k < C)[None, :]
        values = tl.load(x + source[:, None] * C + k[None, :], mask=inside, other=0.0)
        values = (values - mean[:, None]) * scale[:, None]
        values = values * tl.load(gain + k, mask=k < C)[None, :]
        values = values + tl.load(bias + k, mask=k < C)[None, :]
        target = row.to(tl.int64)[:, None] * C + k[None, :]
        tl.store(out + target, values.to(DTYPE), mask=inside)


def layer_norm(
    settings: Settings,
    out: Tensor,
    hidden: Tensor,
    norm: Norm,
    num_rows: int,
    row_at: Tensor | None = None,
) -> None:
    """out[i] = norm(hidden[row_at[i]]), in the products' dtype.

    Args:
        out: (num_rows, C), written.
        hidden: float32 (., C).
        row_at: int32 (num_rows,); None: all in order.
    """
    gain, bias, epsilon = norm
    arguments = {
        "out": out,
        "x": hidden,
        "row_at": row_at,
        "gain": gain,
        "bias": bias,
        "EPSILON": epsilon,
        "C": hidden.shape[1],
        "CHUNK": min(_CHUNK, power_of_two(hidden.shape[1])),
        "GATHERS": row_at is not None,
        "DTYPE": settings.product["DTYPE"],
    }
    run(_layer_norm, (num_rows,), settings, arguments)
