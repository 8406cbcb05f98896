"""Weights of the torch decoder: read one tensor at a time, put into the layout that is fastest.

On a CPU the projections are packed for oneDNN, which reads them much faster than a plain matrix
product does for few tokens (measured: benchmarks/LOG.md); elsewhere they stay (out, in) matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.files import NUMPY_DTYPES
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.errors import EngineClosedError

Linear = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)
Norm = tuple[Tensor, Tensor]  # weight and bias, (C,) each

_PACKED_FOR_TOKENS = 64  # oneDNN packs for an expected number of tokens; this one serves 1 to 256


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Linear] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class Layer:
    ln_1: Norm
    c_attn: Linear
    c_proj: Linear
    ln_2: Norm
    c_fc: Linear
    mlp_proj: Linear


class Weights:
    """All parameters on one device, in one dtype."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._checkpoint: Checkpoint | None = checkpoint
        self.wpe = self._tensor("wpe.weight")
        self.wte, self.head = self._embedding_and_head(checkpoint.tied)
        self.layers = [self._layer(f"h.{i}") for i in range(checkpoint.config.num_layers)]
        self.ln_f = self._norm("ln_f")
        self._checkpoint = None  # its files are no longer needed

    def clear(self) -> None:
        """Give the memory back."""
        self.layers = []
        self.wte = self.wpe = torch.empty(0, device=self.device, dtype=self.dtype)
        self.head = _closed

    def _layer(self, prefix: str) -> Layer:
        return Layer(
            ln_1=self._norm(f"{prefix}.ln_1"),
            c_attn=self._projection(f"{prefix}.attn.c_attn"),
            c_proj=self._projection(f"{prefix}.attn.c_proj"),
            ln_2=self._norm(f"{prefix}.ln_2"),
            c_fc=self._projection(f"{prefix}.mlp.c_fc"),
            mlp_proj=self._projection(f"{prefix}.mlp.c_proj"),
        )

    def _embedding_and_head(self, tied: bool) -> tuple[Tensor, Linear]:
        embedding = self._tensor(EMBEDDING)  # (V, C)
        head = embedding if tied else self._tensor(HEAD)
        return embedding, _linear(head, None)

    def _projection(self, name: str) -> Linear:
        weight = self._tensor(f"{name}.weight").t()  # Conv1D's (in, out) -> (out, in)
        return _linear(weight, self._tensor(f"{name}.bias"))

    def _norm(self, name: str) -> Norm:
        return self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")

    def _tensor(self, name: str) -> Tensor:
        assert self._checkpoint is not None
        return from_numpy(self._checkpoint.read(name)).to(self.device, self.dtype)


def weight_bytes(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """What Weights will occupy."""
    config = checkpoint.config
    count = config.parameter_count(tied=checkpoint.tied)
    if checkpoint.tied and _packs(device, dtype):
        count += config.vocab_size * config.hidden_size  # the head's packed copy of the embedding
    return count * dtype.itemsize


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this CPU and this PyTorch have oneDNN's packed linear layer for `dtype`."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """x (N, in) -> x @ weight.T + bias (N, out), for a weight (out, in) of any strides."""
    if not _packs(weight.device, weight.dtype):
        plain = weight.contiguous()
        return lambda x: F.linear(x, plain, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, bias, "none", [], "")


def from_numpy(array: NDArray[Any]) -> Tensor:
    if not array.flags.writeable:  # somebody else's, who may change it
        array = array.copy()
    if array.dtype == NUMPY_DTYPES["BF16"]:  # PyTorch does not know NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _closed(x: Tensor) -> Tensor:
    raise EngineClosedError("this model has been closed")
