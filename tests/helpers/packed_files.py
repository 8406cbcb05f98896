"""Packed weights on disk: checkpoints to pack, files to spoil, and what loading them did."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from cpu_decoders import native_of
from fastgen.checkpoints.identity import identity_of
from fastgen.checkpoints.packed import PackedHeader, read_header
from fastgen.decoders.cpu.packing import pack_weights
from tiny_checkpoints import CONFIG, write_checkpoint
from waits import wait_until

SIZES: dict[str, Any] = {"device": "cpu", "max_batch_size": 2, "num_threads": 2}
PROMPT = [1, 2, 3, 4]


def settled(folder: Path) -> Path:
    """The folder, once its weight files have been left alone for long enough to be cached."""
    files = sorted(folder.glob("*.safetensors"))

    def is_settled() -> bool:
        identity = identity_of(files)
        return identity is not None and identity.is_settled

    wait_until(is_settled)
    return folder


def checkpoint_of(folder: Path, seed: int = 0) -> Path:
    """A tiny checkpoint of its own for each seed, all of one size, which can be cached."""
    generator = np.random.default_rng(seed)
    c, inner = CONFIG["n_embd"], 4 * CONFIG["n_embd"]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"wte.weight": (CONFIG["vocab_size"], c), "wpe.weight": (CONFIG["n_positions"], c)}
    shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    for layer in range(CONFIG["n_layer"]):
        sizes = {"ln_1": (c,), "ln_2": (c,), "attn.c_attn": (c, 3 * c), "attn.c_proj": (c, c),
                 "mlp.c_fc": (c, inner), "mlp.c_proj": (inner, c)}  # fmt: skip
        for name, shape in sizes.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
    tensors = {
        name: generator.standard_normal(shape, dtype=np.float32) / 2
        for name, shape in shapes.items()
    }
    return settled(write_checkpoint(folder, tensors))


def load(folder: Path, cache: bool | str | Path, **options: Any) -> fastgen.Generator:
    return fastgen.load(folder, cache=cache, **{**SIZES, **options})


def weights_of(model: fastgen.Generator) -> bytes:
    """Every byte of a model's packed weights."""
    return bytes(native_of(model.engine.decoder).weights())


def tokens_of(model: fastgen.Generator) -> tuple[int, ...]:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2, "seed": 1, "ignore_eos": True}
    [generation] = model.generate([PROMPT], **options)
    return generation.completions[0].token_ids


def digest_of(folder: Path, cache: bool | str | Path, **options: Any) -> str:
    """Of all weights that loading gives, and of what they generate."""
    with load(folder, cache, **options) as model:
        return hashlib.sha256(weights_of(model) + repr(tokens_of(model)).encode()).hexdigest()


@contextmanager
def packings(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the name of each checkpoint that is packed."""
    found: list[str] = []

    def counted(checkpoint: Any, *others: Any) -> None:
        found.append(checkpoint.name)
        pack_weights(checkpoint, *others)

    with patch.context() as patched:
        patched.setattr("fastgen.decoders.cpu.weights.pack_weights", counted)
        yield found


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Levels and texts of what was logged since the last call."""
    found = [(record.levelno, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found


def entry_of(cache: Path) -> Path:
    """The one file of a cache."""
    [entry] = cache.iterdir()
    return entry


def header_of(path: Path) -> tuple[PackedHeader, int]:
    """A file's header, and where its weights begin."""
    file = os.open(path, os.O_RDONLY)
    try:
        return read_header(file, str(path))
    finally:
        os.close(file)


def with_header(content: bytes, header: PackedHeader, start: int, **changes: Any) -> bytes:
    """A file of packed weights whose header says something else, with right checksums."""
    return replace(header, **changes).encoded() + content[start:]
