"""Weights of the CUDA decoder: read one tensor at a time, as (out, in) matrices on the device.

int8: a scale for each output, chosen after smoothing (fastgen.decoders.quantization), whose factors
are folded into the layer norms and the values; so kernels need only the scales. An int8 cache needs
smooth values too: their factors are powers of two, so float weights are changed exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.decoders.quantization import Floats, norm_smoothing, value_smoothing
from fastgen.decoders.torch.weights import from_numpy
from fastgen.errors import CheckpointError
from fastgen.kernels.linear import Linear
from fastgen.kernels.norm import Norm


@dataclass(frozen=True, slots=True)
class Layer:
    ln_1: Norm
    c_attn: Linear
    c_proj: Linear
    ln_2: Norm
    c_fc: Linear
    mlp_proj: Linear


class CudaWeights:
    """All parameters on one device.

    Attributes:
        embedding: (V, C), with scales (V,) and factors (C,) where it is the int8 head.
        head: (V, C), with scales (V,) if int8.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        quantized: bool,
        int8_kv: bool,
    ) -> None:
        self._checkpoint: Checkpoint | None = checkpoint
        self._device, self._dtype, self._quantized = device, dtype, quantized
        self._smooths_values = quantized or int8_kv
        self._epsilon = checkpoint.config.layer_norm_epsilon
        self.wpe = self._cast("wpe.weight", self._tensor("wpe.weight"))
        self.layers = [self._layer(f"h.{i}") for i in range(checkpoint.config.num_layers)]
        gain, bias = self._floats("ln_f.weight"), self._floats("ln_f.bias")
        name = EMBEDDING if checkpoint.tied else HEAD
        factors = self._factors(gain, bias, name, input_axis=1)
        self.ln_f = self._norm(gain, bias, factors)
        self.head = self._matrix(name, self._tensor(name), factors)
        self.embedding: tuple[Tensor, Tensor | None, Tensor | None]
        if checkpoint.tied:
            inverse = None if factors is None else torch.from_numpy(1 / factors).to(device)
            self.embedding = (*self.head, inverse)
        else:
            self.embedding = (self._cast(EMBEDDING, self._tensor(EMBEDDING)), None, None)
        self._checkpoint = None  # its files are no longer needed

    def clear(self) -> None:
        """Give the memory back."""
        empty = torch.empty(0, device=self._device)
        self.layers, self.wpe = [], empty
        self.head, self.embedding = (empty, None), (empty, None, None)

    def _layer(self, prefix: str) -> Layer:
        gain, bias = (self._floats(f"{prefix}.ln_1.{part}") for part in ("weight", "bias"))
        name, out_name = f"{prefix}.attn.c_attn", f"{prefix}.attn.c_proj"
        factors = self._factors(gain, bias, f"{name}.weight")
        weight, qkv_bias = self._tensor(f"{name}.weight").t(), self._vector(f"{name}.bias")
        out_factors = None
        if self._smooths_values:
            values = 2 * weight.shape[1]  # they follow queries and keys
            out_factors = self._value_factors(name, out_name, values)
            divisors = torch.ones(len(weight), device=self._device)
            divisors[values:] = torch.from_numpy(out_factors).to(self._device)
            weight, qkv_bias = weight.float() / divisors[:, None], qkv_bias / divisors
        ln_1 = self._norm(gain, bias, factors)
        c_attn = (*self._matrix(f"{name}.weight", weight, factors), qkv_bias)
        gain, bias = (self._floats(f"{prefix}.ln_2.{part}") for part in ("weight", "bias"))
        factors = self._factors(gain, bias, f"{prefix}.mlp.c_fc.weight")
        return Layer(
            ln_1=ln_1,
            c_attn=c_attn,
            c_proj=self._linear(out_name, out_factors),
            ln_2=self._norm(gain, bias, factors),
            c_fc=self._linear(f"{prefix}.mlp.c_fc", factors),
            mlp_proj=self._linear(f"{prefix}.mlp.c_proj", None),
        )

    def _factors(
        self, gain: Floats, bias: Floats, name: str, *, input_axis: int = 0
    ) -> Floats | None:
        """Of the linear layer that follows a norm."""
        if not self._quantized:
            return None
        return norm_smoothing(gain, bias, self._read(name), input_axis=input_axis)

    def _value_factors(self, name: str, out_name: str, first: int) -> Floats:
        weight, bias = self._read(f"{name}.weight"), self._floats(f"{name}.bias")
        return value_smoothing(weight[:, first:], bias[first:], self._read(f"{out_name}.weight"))

    def _norm(self, gain: Floats, bias: Floats, factors: Floats | None) -> Norm:
        if factors is not None:
            gain, bias = gain / factors, bias / factors
        on_device = (torch.from_numpy(part).to(self._device) for part in (gain, bias))
        return (*on_device, self._epsilon)

    def _linear(self, name: str, factors: Floats | None) -> Linear:
        weight = self._tensor(f"{name}.weight").t()  # Conv1D's (in, out) -> (out, in)
        matrix = self._matrix(f"{name}.weight", weight, factors)
        return (*matrix, self._vector(f"{name}.bias"))

    def _matrix(
        self, name: str, weight: Tensor, factors: Floats | None
    ) -> tuple[Tensor, Tensor | None]:
        """(out, in), its inputs multiplied by factors (in,); and the scales (out,) of int8."""
        if factors is not None:
            weight = weight.float() * torch.from_numpy(factors).to(self._device)
        if not self._quantized:
            return self._cast(name, weight), None
        weight = weight.float()
        scales = weight.abs().amax(1) / 127
        whole = (weight / torch.where(scales > 0, scales, 1)[:, None]).round_()
        return whole.to(torch.int8).contiguous(), scales

    def _cast(self, name: str, weight: Tensor) -> Tensor:
        cast = weight.to(self._dtype).contiguous()
        if bool(cast.isinf().any()) and not bool(weight.isinf().any()):
            assert self._checkpoint is not None
            dtype = str(self._dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self._checkpoint.name}: tensor {name} holds values too large for {dtype}"
            )
        return cast

    def _vector(self, name: str) -> Tensor:
        return self._tensor(name).float()

    def _floats(self, name: str) -> Floats:
        return self._read(name).astype(np.float32)

    def _tensor(self, name: str) -> Tensor:
        return from_numpy(self._read(name)).to(self._device)

    def _read(self, name: str) -> np.ndarray:
        assert self._checkpoint is not None
        return self._checkpoint.read(name)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, *, quantized: bool) -> int:
    """What CudaWeights will occupy."""
    config = checkpoint.config
    c, inner = config.hidden_size, config.inner_size
    vectors = config.num_layers * (9 * c + inner) + 2 * c  # biases and norms, float32
    matrices = config.num_layers * (4 * c * c + 2 * c * inner) + config.vocab_size * c
    plain = config.max_positions * c + (0 if checkpoint.tied else config.vocab_size * c)
    if not quantized:
        return (matrices + plain) * dtype.itemsize + 4 * vectors
    outputs = config.num_layers * (5 * c + inner) + config.vocab_size
    return matrices + plain * dtype.itemsize + 4 * (vectors + outputs + c)
