"""Which decoder runs a model: decided once, at load, and shown to whoever asks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from fastgen.checkpoint import Checkpoint
from fastgen.config import DTYPES
from fastgen.decoders.interface import Decoder, DecoderLimits
from fastgen.memory import MemoryPlan
from fastgen.native import native

DECODERS = ("auto", "torch")
_INSTALL_TORCH = "PyTorch is not installed: pip install 'fastgen[torch]'"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; see fastgen.load."""

    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    decoder: str = "auto"
    max_batch_size: int = 32
    max_seq_len: int | None = None
    max_memory: int | None = None
    num_threads: int | None = None
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_memory", "num_threads"):
            value = getattr(self, name)
            if value is None and name != "max_batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        _one_of("dtype", str(self.dtype).removeprefix("torch."), ("auto", *DTYPES))
        _one_of("decoder", self.decoder, DECODERS)
        if self.quantize is not None:
            raise ValueError(f"quantize={self.quantize!r}: no decoder here has quantized weights yet")
        if self.batch_invariant not in (None, False, True):
            raise TypeError("batch_invariant must be True, False or None")
        if self.batch_invariant:
            raise ValueError("batch_invariant=True: the torch decoder cannot promise equal bits")


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """The decoder a model gets and why, where, in what arithmetic, with how much memory."""

    decoder: str
    reason: str
    device: str
    dtype: str
    num_threads: int | None
    limits: DecoderLimits
    memory: MemoryPlan


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


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _package(name: str, hint: str) -> Backend:
    try:
        return Backend(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Backend(name, False, hint)
