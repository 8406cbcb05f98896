"""Packs a checkpoint's weights for the CPU decoder: one tensor at a time, by all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.files import NUMPY_DTYPES
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.decoders.quantization import norm_smoothing, value_smoothing
from fastgen.errors import CheckpointError

Floats = NDArray[np.float32]


def pack_weights(checkpoint: Checkpoint, decoder: Any, weights: str) -> None:
    """Fill the C++ decoder's weights, which are kept as `weights` says (DecoderPlan.weights).

    Raises:
        CheckpointError: a tensor cannot be read, or does not fit the format.
    """
    _Packer(checkpoint, decoder, weights).pack()


class _Packer:
    """Reads a checkpoint's tensors and gives them to the C++ decoder, one or two at a time."""

    def __init__(self, checkpoint: Checkpoint, decoder: Any, weights: str) -> None:
        self._checkpoint, self._native, self._weights = checkpoint, decoder, weights
        self._quantized = weights == "int8"

    def pack(self) -> None:
        checkpoint = self._checkpoint
        self._native.set_positions(self._floats("wpe.weight"))
        if not checkpoint.tied:
            fits = self._native.set_embedding(_bits(checkpoint.read(EMBEDDING)))
            self._require(fits, EMBEDDING)
        for layer in range(checkpoint.config.num_layers):
            self._pack_attention(layer)
            self._pack_mlp(layer)
        gain, bias = self._set_norm(-1, 0, "ln_f")
        name = EMBEDDING if checkpoint.tied else HEAD
        head = checkpoint.read(name)  # (V, C)
        factors = norm_smoothing(gain, bias, head, input_axis=1) if self._quantized else None
        self._require(self._native.pack_head(_bits(head), factors), name)

    def _pack_attention(self, layer: int) -> None:
        gain, bias = self._set_norm(layer, 0, f"h.{layer}.ln_1")
        qkv, qkv_bias = self._read(f"h.{layer}.attn.c_attn")
        out, out_bias = self._read(f"h.{layer}.attn.c_proj")
        qkv_factors = out_factors = None
        if self._quantized:
            values = 2 * len(out)  # they follow queries and keys
            qkv_factors = norm_smoothing(gain, bias, qkv)
            out_factors = value_smoothing(qkv[:, values:], qkv_bias[values:], out)
        self._pack(layer, 0, "attn.c_attn", qkv, qkv_bias, qkv_factors)
        self._pack(layer, 1, "attn.c_proj", out, out_bias, out_factors)

    def _pack_mlp(self, layer: int) -> None:
        gain, bias = self._set_norm(layer, 1, f"h.{layer}.ln_2")
        weight, fc_bias = self._read(f"h.{layer}.mlp.c_fc")
        factors = norm_smoothing(gain, bias, weight) if self._quantized else None
        self._pack(layer, 2, "mlp.c_fc", weight, fc_bias, factors)
        self._pack(layer, 3, "mlp.c_proj", *self._read(f"h.{layer}.mlp.c_proj"), None)

    def _read(self, name: str) -> tuple[NDArray[Any], Floats]:
        return self._checkpoint.read(f"{name}.weight"), self._floats(f"{name}.bias")

    def _pack(
        self,
        layer: int,
        which: int,
        name: str,
        weight: NDArray[Any],
        bias: Floats,
        factors: Floats | None,
    ) -> None:
        fits = self._native.pack_projection(layer, which, _bits(weight), bias, factors)
        self._require(fits, f"h.{layer}.{name}.weight")

    def _set_norm(self, layer: int, which: int, name: str) -> tuple[Floats, Floats]:
        gain, bias = self._floats(f"{name}.weight"), self._floats(f"{name}.bias")
        self._native.set_norm(layer, which == 1, gain, bias)
        return gain, bias

    def _floats(self, name: str) -> Floats:
        return self._checkpoint.read(name).astype(np.float32)

    def _require(self, fits: bool, name: str) -> None:
        if not fits:
            raise CheckpointError(
                f"{self._checkpoint.name}: tensor {name} holds values too large for {self._weights}"
            )


def _bits(weight: NDArray[Any]) -> NDArray[Any]:
    """In C order; bfloat16, which NumPy has not, as its bits."""
    weight = np.ascontiguousarray(weight)
    return weight.view(np.uint16) if weight.dtype == NUMPY_DTYPES["BF16"] else weight
