"""A checkpoint as every engine reads it: one file, in float32, with GPT-2's plain names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.errors import CheckpointError


def write_plain(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder, with config.json as it is and model.safetensors.

    16-bit weights are widened, which is exact; shards, prefixes, masks and whatever else the model
    is not built from are left out.

    Raises:
        CheckpointError: there is no config.json to copy: the model is one in memory.
    """
    if checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.name} is not in a folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint.folder / "config.json", folder)
    tensors = {
        name: np.ascontiguousarray(checkpoint.read(name).astype(np.float32))
        for name, _ in checkpoint.tensors()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
