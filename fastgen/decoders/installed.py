"""What this installation can use. Apart from select.py, since loading a model needs none of it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from fastgen.decoders.select import INSTALL_TORCH
from fastgen.native import native


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A part that may be there or not; `detail` says which version, or what is missing."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'yes' if self.available else 'no'} ({self.detail})"


def backends() -> list[BackendInfo]:
    """What this installation can use, without importing any of it."""
    features = ", ".join(native.cpu_features()) if native is not None else ""
    return [
        BackendInfo("native", native is not None, features or "no compiler when it was installed"),
        _package("torch", INSTALL_TORCH),
        _package("triton", "for NVIDIA GPUs: pip install 'fastgen[gpu]'"),
        _package("transformers", "for sentencepiece vocabularies: 'fastgen[hf]'"),
    ]


def _package(name: str, hint: str) -> BackendInfo:
    try:
        return BackendInfo(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return BackendInfo(name, False, hint)
