"""Models with one token that turns its row into NaN, keys and values included.

Its embedding is so large that the first layer norm overflows. The head is a copy of what the
embedding was, so that rows without the token have the logits they always had.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fastgen.frontends.generator import BUNDLED_MODEL
from tiny_checkpoints import CONFIG, Array, random_tensors, write_checkpoint

POISON = 200  # a control character, which no text holds
_LARGE = 3e38  # finite in float32 and bfloat16; the sum of two is not


def save_poisoned(folder: Path, num_layers: int = 6) -> Path:
    """The bundled model. With fewer layers it is faster, and no longer knows the language."""
    for path in BUNDLED_MODEL.iterdir():
        shutil.copy(path, folder)
    tensors = {
        name.removeprefix("transformer."): tensor.astype(np.float32)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    layers = {f"h.{layer}." for layer in range(num_layers)}
    kept = {k: v for k, v in tensors.items() if not k.startswith("h.") or k[:4] in layers}
    save_file(_poisoned(kept), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": num_layers}))
    return folder


def save_poisoned_odd(folder: Path) -> Path:
    """A random one of the same vocabulary, whose sizes no tile and no pair of numbers divides."""
    sizes = {"n_embd": 35, "n_head": 5, "n_inner": 37, "n_positions": 64, "vocab_size": 4096}
    return write_checkpoint(folder, _poisoned(random_tensors({**CONFIG, **sizes})), **sizes)


def _poisoned(tensors: dict[str, Array]) -> dict[str, Array]:
    embedding = tensors["wte.weight"].copy()
    embedding[POISON] = _LARGE
    return {**tensors, "lm_head.weight": tensors["wte.weight"], "wte.weight": embedding}
