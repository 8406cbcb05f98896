"""CPU decoders as a test wants them: instruction set, arithmetic, number of threads. No PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.decoders.interface import Decoder
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.frontends.generator import open_model
from fastgen.native import native

INSTRUCTION_SETS: list[str] = native.instruction_sets() if native is not None else []


class Arithmetic(NamedTuple):
    dtype: str  # of activations, and of keys and values if nothing else is said
    weights: str
    kv_dtype: str | None = None


ARITHMETICS = {
    "float32": Arithmetic("float32", "float32"),
    "float16_weights": Arithmetic("float32", "float16"),
    "bfloat16_weights": Arithmetic("float32", "bfloat16"),
    "bfloat16": Arithmetic("bfloat16", "bfloat16"),
    "int8": Arithmetic("bfloat16", "int8"),
    "int8_float32": Arithmetic("float32", "int8"),
    "float32_kv8": Arithmetic("float32", "float32", "int8"),
    "float16_weights_kv8": Arithmetic("float32", "float16", "int8"),
    "bfloat16_kv8": Arithmetic("bfloat16", "bfloat16", "int8"),
    "int8_kv8": Arithmetic("bfloat16", "int8", "int8"),
}
# Those that differ in more than how keys and values are kept.
KINDS_OF_WEIGHTS = [name for name, (_, _, kv_dtype) in ARITHMETICS.items() if kv_dtype is None]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Decoders made inside take this path, and keep it; "": the one that they would take anyway."""
    before = os.environ.get("FASTGEN_ISA", "")
    os.environ["FASTGEN_ISA"] = name or before
    try:
        yield
    finally:
        os.environ["FASTGEN_ISA"] = before


def plan_of(
    model: Path | None,
    arithmetic: str = "float32",
    *,
    num_threads: int = 1,
    max_logits: int | None = None,
    **options: Any,
) -> tuple[Checkpoint, DecoderPlan]:
    """As `fastgen.load` plans it, but any arithmetic for any file, and threads beyond the cores."""
    checkpoint = open_model(model)
    chosen: dict[str, Any] = {"decoder": "cpu", "max_batch_size": 8} | options
    plan = plan_decoder(checkpoint, LoadOptions(**chosen))
    limits = replace(plan.limits, max_logits=max_logits or plan.limits.max_logits)
    dtype, weights, kv_dtype = ARITHMETICS[arithmetic]
    return checkpoint, replace(
        plan,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        num_threads=num_threads,
        limits=limits,
    )


@contextmanager
def cpu_decoder(
    model: Path | None = None, arithmetic: str = "float32", *, isa: str = "", **options: Any
) -> Iterator[Decoder]:
    """A decoder of its own, closed afterwards; `options` are plan_of's."""
    with instruction_set(isa):
        decoder = build_decoder(*plan_of(model, arithmetic, **options))
    try:
        yield decoder
    finally:
        decoder.close()


def native_of(decoder: Any) -> Any:
    """The C++ decoder in a CPU decoder, to be called with what Python would never hand it."""
    return decoder._native


def native_sampler_of(decoder: Any) -> Any:
    """The C++ sampler that a CPU decoder draws with."""
    return decoder._sampler.native
