"""Sizes of GPT-2, checkpoints of them with random weights, and the precisions they are run in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fastgen.checkpoints.config import GPT2Config
from fastgen.decoders.plan import DecoderPlan

VOCAB_SIZE, POSITIONS = 50_257, 1024  # GPT-2's
SPREAD = 0.1  # standard deviation of the random weights


@dataclass(frozen=True)
class Shape:
    """A model's size. `inner` is the width of its MLPs; 0 stands for 4 x hidden."""

    layers: int
    hidden: int
    heads: int
    inner: int = 0
    vocab: int = VOCAB_SIZE

    @classmethod
    def of(cls, config: GPT2Config) -> Self:
        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            inner=config.inner_size,
            vocab=config.vocab_size,
        )

    @property
    def linear(self) -> int:
        """Weights in the layers' matrices: multiply-adds a token."""
        inner = self.inner or 4 * self.hidden
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * inner)

    @property
    def head(self) -> int:
        """Weights in the head."""
        return self.vocab * self.hidden

    @property
    def context(self) -> int:
        """Numbers kept for each token of the context; as many multiply-adds of attention."""
        return 2 * self.layers * self.hidden


SHAPES = {
    "tiny": Shape(layers=2, hidden=64, heads=2),
    "gpt2": Shape(layers=12, hidden=768, heads=12),
    "gpt2-medium": Shape(layers=24, hidden=1024, heads=16),
    "gpt2-large": Shape(layers=36, hidden=1280, heads=20),
    "gpt2-xl": Shape(layers=48, hidden=1600, heads=25),
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Precision:
    """What a weight and a number of the KV cache take, and whose peak bounds the arithmetic."""

    weight_bytes: int
    kv_bytes: int
    linear_peak: str
    attention_peak: str

    @classmethod
    def of(cls, plan: DecoderPlan) -> Self:
        """The CUDA decoder's int8 weights are widened before they are multiplied, and so is float16
        on a CPU. The scales of keys and values of 8 bits are left out, and a CPU multiplies those
        with 16 bits, slower than int8's peak: shares of such a limit are too low.
        """
        wide = plan.dtype
        if wide == "float16" and plan.device.startswith("cpu"):
            wide = "float32"
        kv_dtype, multiplies_int8 = plan.kv_dtype or plan.dtype, plan.decoder != "cuda"
        return cls(
            weight_bytes=_BYTES[plan.weights],
            kv_bytes=_BYTES[kv_dtype],
            linear_peak="int8" if plan.weights == "int8" and multiplies_int8 else wide,
            attention_peak="int8" if kv_dtype == "int8" and multiplies_int8 else wide,
        )

    @property
    def peaks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.linear_peak, self.attention_peak)))


def save_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a float32 checkpoint with random weights, as transformers lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": shape.vocab,
        "n_positions": POSITIONS,
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "bos_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(_random_tensors(shape, np.random.default_rng(seed)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_prompts(
    count: int, length: int, rng: np.random.Generator, vocab: int = VOCAB_SIZE
) -> list[list[int]]:
    found: list[list[int]] = rng.integers(0, vocab, (count, length)).tolist()
    return found


def _random_tensors(
    shape: Shape, rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    c, inner = shape.hidden, shape.inner or 4 * shape.hidden

    def random(*sizes: int) -> NDArray[np.float32]:
        return rng.standard_normal(sizes, np.float32) * np.float32(SPREAD)

    def norm(name: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        yield f"{name}.weight", 1 + random(c)
        yield f"{name}.bias", random(c)

    yield "wte.weight", random(shape.vocab, c)
    yield "wpe.weight", random(POSITIONS, c)
    projections = {"attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c)}
    projections |= {"mlp.c_fc": (c, inner), "mlp.c_proj": (inner, c)}
    for layer in range(shape.layers):
        yield from norm(f"h.{layer}.ln_1")
        yield from norm(f"h.{layer}.ln_2")
        for name, sizes in projections.items():
            yield f"h.{layer}.{name}.weight", random(*sizes)
            yield f"h.{layer}.{name}.bias", random(sizes[1])
    yield from norm("ln_f")


def weight_bytes(shape: Shape, precision: Precision) -> int:
    """Of the matrices that every decode step reads."""
    return (shape.linear + shape.head) * precision.weight_bytes


def described(shape: Shape) -> dict[str, Any]:
    """As the record tells it."""
    return {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "inner": shape.inner or 4 * shape.hidden,
        "vocab": shape.vocab,
    }
