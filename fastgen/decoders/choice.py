"""Which decoder runs a model: decided once, at load, and shown to whoever asks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from fastgen.checkpoint import Checkpoint
from fastgen.decoders.interface import Decoder
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.native import native

_INSTALL_TORCH = "PyTorch is not installed: pip install 'fastgen[torch]'"


@dataclass(frozen=True, slots=True)
class Backend:
    """A part that may be there or not; `detail` says which version, or what is missing."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'yes' if self.available else 'no'} ({self.detail})"


def backends() -> list[Backend]:
    """What this installation can use, without importing any of it."""
    features = ", ".join(native.cpu_features()) if native is not None else ""
    return [
        Backend("native", native is not None, features or "no compiler when it was installed"),
        _package("torch", _INSTALL_TORCH),
        _package("triton", "for NVIDIA GPUs: pip install 'fastgen[gpu]'"),
        _package("transformers", "for BERT and sentencepiece vocabularies: 'fastgen[hf]'"),
    ]


def plan_decoder(checkpoint: Checkpoint, options: LoadOptions) -> DecoderPlan:
    """Choose a decoder and plan its memory; nothing is loaded.

    Raises:
        ValueError: an option that cannot be met, with what can.
        ModuleNotFoundError: no decoder is installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(_INSTALL_TORCH)
    from fastgen.decoders.torch_plan import plan_torch

    return plan_torch(checkpoint, options)


def build_decoder(checkpoint: Checkpoint, plan: DecoderPlan) -> Decoder:
    """Read the weights and allocate all memory, as planned."""
    from fastgen.decoders.torch_plan import build_torch

    return build_torch(checkpoint, plan)


def _package(name: str, hint: str) -> Backend:
    try:
        return Backend(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Backend(name, False, hint)
