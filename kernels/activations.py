"""The activations of GPT-2 checkpoints, in float32. NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, NAME: tl.constexpr):
    """`NAME` is what fastgen.checkpoints.config.ACTIVATIONS names."""
    if NAME == "gelu" or NAME == "gelu_python":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "silu" or NAME == "swish":
        y = x * tl.sigmoid(x)
    elif NAME == "tanh":
        small = tl.exp(-2.0 * tl.abs(x))  # never overflows
        y = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)
    else:  # gelu with tanh: 0.5 * (1 + tanh(u)) = sigmoid(2 u)
        tl.static_assert(NAME == "gelu_new" or NAME == "gelu_fast" or NAME == "gelu_pytorch_tanh")
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y
