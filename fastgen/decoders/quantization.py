"""int8 weights: the factors that make a linear layer easy to quantize, chosen from weights alone.

Smoothing (SmoothQuant: Xiao et al. 2022, arXiv 2211.10438): y = (x / s) @ (W * s[:, None]). Input
channel j is as hard for the activations as for the weights with s_j = sqrt(max|x_j| / max|W_j|).
SmoothQuant measures max|x_j| on text; here it is estimated:

- After a layer norm, from gain and bias. That misses a residual channel that stays large beyond
  the usual spread, whose gain is small to match: raised by a factor below 1, it would take the
  activations' scale for itself. So these factors are never below 1.
- Before attn.c_proj, from the columns of the values: attention only averages them.
- mlp.c_proj gets none: weights alone tell too little of what an activation puts out.

Factors are powers of two with median about 1. x / s, W * s and, where s is folded into the gain and
bias of the norm or into the values' weight scales, their quotients too, are then exact: where s is
applied changes no bit.

Shapes: K input channels, N output channels, C hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_NORMED_PEAK = 4.0  # few values after a layer norm, before its gain, are larger
_MAX_EXPONENT = 12  # of a factor; beyond it a channel is as good as dead
_SLICE = 2**17  # elements looked at in one go: they and their magnitudes stay in the cache
_MAGNITUDE_BITS = {2: (np.uint16, 0x7FFF), 4: (np.uint32, 0x7FFFFFFF)}  # by bytes of a float


def norm_smoothing(
    gain: NDArray[Any], bias: NDArray[Any], weight: NDArray[Any], *, input_axis: int = 0
) -> Floats:
    """Factors of a linear layer after a layer norm: attn.c_attn, mlp.c_fc and the head.

    Args:
        gain, bias: (K,) of the norm.
        weight: (K, N); (N, K) with input_axis=1, as the head is.

    Returns:
        (K,), powers of two, at least 1.
    """
    input_peaks = np.float32(_NORMED_PEAK) * _magnitudes(gain) + _magnitudes(bias)
    return np.maximum(_balance(input_peaks, peaks(weight, input_axis)), np.float32(1))


def value_smoothing(
    value_weight: NDArray[Any], value_bias: NDArray[Any], projection: NDArray[Any]
) -> Floats:
    """Factors of attn.c_proj.

    Args:
        value_weight: (C, C), the last third of attn.c_attn's columns; value_bias: (C,) likewise.
        projection: (C, C), attn.c_proj's own weight.

    Returns:
        (C,), powers of two. The values' weight scales and bias can be divided by them instead of
        attn.c_proj's input.
    """
    input_peaks = peaks(value_weight, 1) + _magnitudes(value_bias)
    return _balance(input_peaks, peaks(projection, 0))


def peaks(weight: NDArray[Any], axis: int) -> Floats:
    """max|weight| of each row (axis 0) or each column (axis 1) of a finite matrix.

    Finite floats without their sign bit order as integers do, which NumPy compares fast in every
    dtype; a slice of rows at a time, so that no copy of the matrix is made.
    """
    integer, mask = _MAGNITUDE_BITS[weight.dtype.itemsize]
    found = np.zeros(weight.shape[axis], integer)
    for rows in _row_slices(weight):
        magnitudes = weight[rows].view(integer) & integer(mask)
        if axis == 0:
            magnitudes.max(axis=1, out=found[rows])
        else:
            np.maximum(found, magnitudes.max(axis=0), out=found)
    return found.view(weight.dtype).astype(np.float32)


def _magnitudes(vector: NDArray[Any]) -> Floats:
    return np.abs(vector.astype(np.float32))


def _row_slices(weight: NDArray[Any]) -> Iterator[slice]:
    num_rows, num_columns = weight.shape
    step = max(1, _SLICE // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _balance(input_peaks: Floats, weight_peaks: Floats) -> Floats:
    """sqrt(input / weight) over its median, to the nearest power of two; 1 where either is 0."""
    alive = (input_peaks > 0) & (weight_peaks > 0)
    factors = np.ones_like(input_peaks)
    if alive.any():
        # In float64: how the last bit of a float32 logarithm is rounded depends on the processor.
        peaks = input_peaks[alive].astype(np.float64), weight_peaks[alive].astype(np.float64)
        exponents = (np.log2(peaks[0]) - np.log2(peaks[1])) / 2
        exponents = np.rint(exponents - np.median(exponents))
        exponents = np.nan_to_num(np.clip(exponents, -_MAX_EXPONENT, _MAX_EXPONENT))
        factors[alive] = np.ldexp(1.0, exponents.astype(np.int32))
    return factors
