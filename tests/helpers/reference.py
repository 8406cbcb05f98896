"""GPT-2 in float64, slow and obvious, written from the model's definition alone.

Independent of fastgen: it reads config.json and tensors itself. Shapes: T tokens, H heads, D head
size, C hidden, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16)
import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf, expit

Array = np.ndarray[Any, np.dtype[np.float64]]


def gelu_tanh(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_python": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "swish": lambda x: x * expit(x),
    "tanh": np.tanh,
    "sigmoid": expit,
}


ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


class ReferenceGPT2:
    """Logits of whole sequences, without a cache."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        known = {ours: config.get(ours, config.get(general)) for ours, general in ALIASES.items()}
        self.config = {**DEFAULTS, **config, **known}
        stored = {}
        for file in sorted(folder.glob("*.safetensors")):
            stored.update(load_file(file))
        self.tensors = {
            name.removeprefix("transformer."): tensor.astype(np.float64)
            for name, tensor in stored.items()
        }
        if "wte.weight" not in self.tensors:
            self.tensors["wte.weight"] = self.tensors["lm_head.weight"]
        self.head = self.tensors.get("lm_head.weight", self.tensors["wte.weight"])

    def logits(self, token_ids: list[int]) -> Array:
        """(T, V)"""
        x = self.tensors["wte.weight"][token_ids] + self.tensors["wpe.weight"][: len(token_ids)]
        for layer in range(self.config["n_layer"]):
            x = x + self._attention(self._norm(x, f"h.{layer}.ln_1"), layer)
            inner = self._project(self._norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            activated = ACTIVATIONS[self.config["activation_function"]](inner)
            x = x + self._project(activated, f"h.{layer}.mlp.c_proj")
        return self._norm(x, "ln_f") @ self.head.T

    def _norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        normed = centred / np.sqrt(variance + self.config["layer_norm_epsilon"])
        scaled: Array = normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]
        return scaled

    def _project(self, x: Array, name: str) -> Array:
        return x @ self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def _attention(self, x: Array, layer: int) -> Array:
        count, width = x.shape
        heads = self.config["n_head"]
        qkv = self._project(x, f"h.{layer}.attn.c_attn")
        query, key, value = qkv.reshape(count, 3, heads, width // heads).transpose(1, 2, 0, 3)
        scores = query @ key.transpose(0, 2, 1)  # (H, T, T)
        if self.config.get("scale_attn_weights", True):
            scores = scores / np.sqrt(width // heads)
        if self.config.get("scale_attn_by_inverse_layer_idx", False):
            scores = scores / (layer + 1)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = (weights @ value).transpose(1, 0, 2).reshape(count, width)
        return self._project(attended, f"h.{layer}.attn.c_proj")
