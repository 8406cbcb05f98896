"""Fast, reproducible GPT-2 inference in your Python process.

    import fastgen
    model = fastgen.load()
    print(model("In the beginning"))

Names are bound when first used, so that importing fastgen imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.decoders.installed import BackendInfo, backends
    from fastgen.engine.request_limits import RequestLimits
    from fastgen.errors import (
        CheckpointError,
        EngineClosedError,
        EngineDeadError,
        EngineError,
        NothingToDrawError,
        OptionError,
        OptionTypeError,
        QueueFull,
        RequestCancelledError,
        RequestTimeoutError,
        RowFailedError,
        SlowReaderError,
        StepFailedError,
    )
    from fastgen.frontends.async_engine import AsyncEngine, AsyncStream
    from fastgen.frontends.engine_thread import QueueConfig
    from fastgen.frontends.generator import BUNDLED_MODEL, Generator, load
    from fastgen.frontends.pack import pack
    from fastgen.frontends.stream import Stream
    from fastgen.frontends.threaded_engine import ThreadedEngine, ThreadedStream
    from fastgen.hf.model import GPT2LMHeadModel, accelerate
    from fastgen.results import Completion, Generation, Piece, Score, Timings, TokenLogprobs
    from fastgen.sampling.params import SamplingParams

__version__ = "0.1.0"

_MODULES = {
    "AsyncEngine": "frontends.async_engine",
    "AsyncStream": "frontends.async_engine",
    "BUNDLED_MODEL": "frontends.generator",
    "BackendInfo": "decoders.installed",
    "CheckpointError": "errors",
    "Completion": "results",
    "EngineClosedError": "errors",
    "EngineDeadError": "errors",
    "EngineError": "errors",
    "GPT2LMHeadModel": "hf.model",
    "Generation": "results",
    "Generator": "frontends.generator",
    "NothingToDrawError": "errors",
    "OptionError": "errors",
    "OptionTypeError": "errors",
    "Piece": "results",
    "QueueConfig": "frontends.engine_thread",
    "QueueFull": "errors",
    "RequestCancelledError": "errors",
    "RequestLimits": "engine.request_limits",
    "RequestTimeoutError": "errors",
    "RowFailedError": "errors",
    "SamplingParams": "sampling.params",
    "Score": "results",
    "SlowReaderError": "errors",
    "StepFailedError": "errors",
    "Stream": "frontends.stream",
    "ThreadedEngine": "frontends.threaded_engine",
    "ThreadedStream": "frontends.threaded_engine",
    "Timings": "results",
    "TokenLogprobs": "results",
    "accelerate": "hf.model",
    "backends": "decoders.installed",
    "load": "frontends.generator",
    "pack": "frontends.pack",
}

__all__ = [
    "BUNDLED_MODEL",
    "AsyncEngine",
    "AsyncStream",
    "BackendInfo",
    "CheckpointError",
    "Completion",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "GPT2LMHeadModel",
    "Generation",
    "Generator",
    "NothingToDrawError",
    "OptionError",
    "OptionTypeError",
    "Piece",
    "QueueConfig",
    "QueueFull",
    "RequestCancelledError",
    "RequestLimits",
    "RequestTimeoutError",
    "RowFailedError",
    "SamplingParams",
    "Score",
    "SlowReaderError",
    "StepFailedError",
    "Stream",
    "ThreadedEngine",
    "ThreadedStream",
    "Timings",
    "TokenLogprobs",
    "__version__",
    "accelerate",
    "backends",
    "load",
    "pack",
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
