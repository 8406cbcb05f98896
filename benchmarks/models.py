"""Random GPT-2 checkpoints of known shapes, and the precisions in which they are run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE, POSITIONS = 50_257, 1024
PROMPT, NEW = 32, 96  # tokens of the work by which decoding is judged
SPREAD = 0.1  # standard deviation of the random weights


@dataclass(frozen=True)
class Shape:
    """A GPT-2's size."""

    layers: int
    hidden: int
    heads: int

    @property
    def linear(self) -> int:
        """Weights in the layers' matrices: multiply-adds a token."""
        return 12 * self.layers * self.hidden**2

    @property
    def head(self) -> int:
        """Weights in the tied head."""
        return VOCAB_SIZE * self.hidden

    @property
    def context(self) -> int:
        """Numbers kept for each token of the context; as many multiply-adds of attention."""
        return 2 * self.layers * self.hidden


SHAPES = {
    "tiny": Shape(layers=2, hidden=64, heads=2),
    "124M": Shape(layers=12, hidden=768, heads=12),
    "355M": Shape(layers=24, hidden=1024, heads=16),
}


@dataclass(frozen=True)
class Precision:
    """What a weight and a number of the KV cache take, and whose peak bounds the arithmetic."""

    weight_bytes: int
    kv_bytes: int
    linear_peak: str
    attention_peak: str
    load: dict[str, Any] = field(default_factory=dict)  # options of fastgen.load

    @property
    def peaks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.linear_peak, self.attention_peak)))


PRECISIONS = {
    "float32": Precision(4, 4, "float32", "float32", {"dtype": "float32"}),
    "bfloat16": Precision(2, 2, "bfloat16", "bfloat16", {"dtype": "bfloat16"}),
    "int8": Precision(1, 2, "int8", "bfloat16", {"quantize": "int8"}),
}


def save_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a float32 checkpoint with random weights, as transformers lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCAB_SIZE,
        "n_positions": POSITIONS,
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "bos_token_id": VOCAB_SIZE - 1,
        "eos_token_id": VOCAB_SIZE - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(_random_tensors(shape, np.random.default_rng(seed)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_prompts(count: int, length: int, rng: np.random.Generator) -> list[list[int]]:
    return rng.integers(0, VOCAB_SIZE, (count, length)).tolist()


def names(text: str) -> list[str]:
    """The names in "a,b"."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    """The numbers in "1,2"; none in ""."""
    return [int(name) for name in names(text)]


def add_choice(parser: argparse.ArgumentParser, option: str, default: str, known: Any) -> None:
    """An option that takes some of the known names, with commas between them."""

    def some(text: str) -> list[str]:
        unknown = [name for name in names(text) if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names(text)

    parser.add_argument(option, type=some, default=default, help=f"default: {default}")


def _random_tensors(
    shape: Shape, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    c = shape.hidden

    def random(*sizes: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(sizes, np.float32) * np.float32(SPREAD)

    def norm(name: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        yield f"{name}.weight", 1 + random(c)
        yield f"{name}.bias", random(c)

    yield "wte.weight", random(VOCAB_SIZE, c)
    yield "wpe.weight", random(POSITIONS, c)
    projections = {"attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c)}
    projections |= {"mlp.c_fc": (c, 4 * c), "mlp.c_proj": (4 * c, c)}
    for layer in range(shape.layers):
        yield from norm(f"h.{layer}.ln_1")
        yield from norm(f"h.{layer}.ln_2")
        for name, sizes in projections.items():
            yield f"h.{layer}.{name}.weight", random(*sizes)
            yield f"h.{layer}.{name}.bias", random(sizes[1])
    yield from norm("ln_f")
