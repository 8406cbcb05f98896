"""fastgen: GPT-2 inference, as fast and as exact as the machine allows.

    import fastgen
    model = fastgen.load()
    print(model("In the beginning"))

Names are bound when first used, so that importing fastgen imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.async_engine import AsyncEngine, AsyncStream
    from fastgen.decoders.choice import Backend, backends
    from fastgen.engine_thread import Terms
    from fastgen.errors import CheckpointError, EngineError, QueueFull
    from fastgen.generator import Generator, load
    from fastgen.hf.model import GPT2LMHeadModel, accelerate
    from fastgen.limits import Limits
    from fastgen.results import Completion, Generation, Piece, Score, Timings, TokenLogprobs
    from fastgen.sampling_params import SamplingParams
    from fastgen.stream import Stream
    from fastgen.threaded_engine import ThreadedEngine, ThreadedStream

__version__ = "0.1.0"

_MODULES = {
    "AsyncEngine": "async_engine",
    "AsyncStream": "async_engine",
    "Backend": "decoders.choice",
    "CheckpointError": "errors",
    "Completion": "results",
    "EngineError": "errors",
    "GPT2LMHeadModel": "hf.model",
    "Generation": "results",
    "Generator": "generator",
    "Limits": "limits",
    "Piece": "results",
    "QueueFull": "errors",
    "SamplingParams": "sampling_params",
    "Score": "results",
    "Stream": "stream",
    "Terms": "engine_thread",
    "ThreadedEngine": "threaded_engine",
    "ThreadedStream": "threaded_engine",
    "Timings": "results",
    "TokenLogprobs": "results",
    "accelerate": "hf.model",
    "backends": "decoders.choice",
    "load": "generator",
}

__all__ = [
    "AsyncEngine",
    "AsyncStream",
    "Backend",
    "CheckpointError",
    "Completion",
    "EngineError",
    "GPT2LMHeadModel",
    "Generation",
    "Generator",
    "Limits",
    "Piece",
    "QueueFull",
    "SamplingParams",
    "Score",
    "Stream",
    "Terms",
    "ThreadedEngine",
    "ThreadedStream",
    "Timings",
    "TokenLogprobs",
    "__version__",
    "accelerate",
    "backends",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"fastgen.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if not _MODULES[name].startswith("hf.") or error.name not in ("torch", "transformers"):
            raise
        message = f"{name} needs {error.name}: pip install 'fastgen[hf]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
