"""One run of `fastgen bench`: load, measure, compare, and the record of all of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.bench.compare import Comparison, compare
from fastgen.bench.fallbacks import fallbacks, notes
from fastgen.bench.hardware_peaks import MemoryWatch, limits_of
from fastgen.bench.machine import machine
from fastgen.bench.measure import Work, take_rounds, warm_up
from fastgen.bench.peer_process import PeerError
from fastgen.bench.plain_checkpoint import write_plain
from fastgen.bench.shapes import Precision, Shape, described, weight_bytes
from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.decoders.machine import granted_cores
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.engine.stats import EngineStats
from fastgen.frontends.generator import Generator, load, open_model
from fastgen.speculation.choose import Speculation, check_choice

SCHEMA = "fastgen-bench/1"
NOISY = 1.25  # highest over lowest read bandwidth

Record = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is to be measured.

    Attributes:
        model: a folder or hub id.
        name: how it is called.
        is_plain: every engine reads it as it is.
        options: as of fastgen.load.
        batches: batch sizes, in rows.
        sampling: how `work.params` were written.
        peers: with which engines it is compared; None: not at all.
        pythons: the interpreters of peers that are not in this one's.
        scratch: where peers may write.
        speculate, draft_model: as of fastgen.load.
    """

    model: str
    name: str
    is_plain: bool
    options: LoadOptions
    work: Work
    batches: Sequence[int]
    rounds: int
    sampling: str
    peers: Sequence[str] | None
    pythons: Mapping[str, str]
    scratch: Path
    speculate: str = "off"
    draft_model: str | None = None
    revision: str | None = None
    allow_fallback: bool = False

    @property
    def load_options(self) -> Record:
        """Of fastgen.load."""
        return {
            **dataclasses.asdict(self.options),
            "speculate": self.speculate,
            "draft_model": self.draft_model,
        }

    @property
    def num_stages(self) -> int:
        """How often `progress` is called, at most."""
        own = 1 + len(self.batches) * (1 + self.rounds)
        peers = () if self.peers is None else self.peers
        turns = len(self.batches) * (1 + self.rounds) * (1 + len(peers))
        return own + (2 * len(peers) + 2 + turns if self.peers is not None else 0)


class FallbackError(ValueError):
    """The model would not run as fast as fastgen can."""


def measure(run: Run, progress: Progress) -> Record:
    """The whole record; see benchmarks/README.md for what its numbers are.

    Raises:
        FallbackError: see fallbacks.py; nothing has been measured then.
        ValueError, CheckpointError: the model or an option is wrong.
    """
    check_choice(run.speculate, has_draft_model=run.draft_model is not None)
    checkpoint = open_model(run.model, run.revision)
    plan = Speculation(run.speculate, None, run.options).plan(checkpoint)
    if run.peers is not None:
        _compared_precision(plan)
    found = fallbacks(plan, run.options)
    if found and not run.allow_fallback:
        raise FallbackError(
            "this would not be fastgen at its best: " + "; ".join(found) + " "
            "(--allow-fallback measures it all the same)"
        )
    record: Record = {
        "schema": SCHEMA,
        "machine": machine(["numpy", "torch", "triton"]),
        "model": _model(run, checkpoint),
        "decoder": _decoder(plan),
        "options": {name: value for name, value in run.load_options.items() if value is not None},
        "work": {
            "prompt_len": run.work.prompt_len,
            "output_len": run.work.output_len,
            "sampling": run.sampling,
            "rounds": run.rounds,
        },
    }
    record |= _own(run, Shape.of(checkpoint.config), Precision.of(plan), progress)
    record["comparison"] = None if run.peers is None else _compared(run, plan, checkpoint, progress)
    record["fallbacks"] = found
    record["notes"] = [*notes(plan), *_noise(record["limits"])]
    return record


def _own(run: Run, shape: Shape, precision: Precision, progress: Progress) -> Record:
    """fastgen in this process: loading, memory, and its rounds between the limits."""
    watch = MemoryWatch()
    progress("loading")
    start = time.perf_counter()
    with load(run.model, revision=run.revision, **run.load_options) as model:
        load_seconds = time.perf_counter() - start
        warm_up(model, run.work, run.batches, progress)
        memory = _memory(model, watch)
        before = dataclasses.replace(model.engine.stats)
        with limits_of(model.plan, precision, weight_bytes(shape, precision)) as limits:
            found = take_rounds(model, run.work, run.batches, limits, run.rounds, progress)
            seen = limits.record()
        speculation = _speculation(before, model.engine.stats)
    return {
        "speculation": speculation if model.engine.drafting.is_on else None,
        "load_seconds": round(load_seconds, 3),
        "memory": memory,
        "limits": seen,
        "results": [each.record(shape, precision) for each in found],
    }


def _compared(run: Run, plan: DecoderPlan, checkpoint: Checkpoint, progress: Progress) -> Record:
    progress("writing the checkpoint for other engines")
    plain = run.scratch / "plain"
    job = Comparison(
        folder=Path(run.model) if run.is_plain else write_plain(checkpoint, plain),
        scratch=run.scratch,
        peers=run.peers or (),
        pythons=run.pythons,
        precision=_compared_precision(plan),
        device=plan.device,
        load=_own_options(run.options, plan),
        threads=plan.num_threads or granted_cores(),
        batches=run.batches,
        prompt_len=run.work.prompt_len,
        output_len=run.work.output_len,
        rounds=run.rounds,
        vocab=checkpoint.config.vocab_size,
    )
    try:
        return compare(job, progress)
    except PeerError as error:  # what was measured before it is not lost
        return {**job.about, "peers": {"fastgen": {"why_not": str(error)}}, "results": []}


def _compared_precision(plan: DecoderPlan) -> str:
    """What peers are asked for.

    Raises:
        ValueError: there is none that means the same to them.
    """
    if plan.weights == "int8" or plan.dtype in ("float32", "bfloat16"):
        return plan.weights if plan.weights == "int8" else plan.dtype
    raise ValueError(f"--compare knows float32, bfloat16 and int8, not {plan.dtype}")


def _own_options(options: LoadOptions, plan: DecoderPlan) -> Record:
    """Of fastgen.load, as this process had them, but those that a job says itself."""
    names = ("dtype", "quantize", "kv_dtype", "max_memory")
    return {"decoder": plan.decoder, **{name: getattr(options, name) for name in names}}


def _memory(model: Generator, watch: MemoryWatch) -> Record:
    peak = watch.peak(model.plan.device)
    return {
        "planned_mb": round(model.plan.memory.total / 2**20),
        "peak_mb": None if peak is None else round(peak / 2**20),
    }


def _speculation(before: EngineStats, after: EngineStats) -> Record:
    """What came of the guessed tokens of all rounds."""
    names = ("steps", "speculated_steps", "drafted_tokens", "accepted_tokens")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def _model(run: Run, checkpoint: Checkpoint) -> Record:
    return {
        "name": run.name,
        "parameters": checkpoint.config.parameter_count(tied=checkpoint.tied),
        "weights_dtype": checkpoint.dtype,
        **described(Shape.of(checkpoint.config)),
    }


def _decoder(plan: DecoderPlan) -> Record:
    return {
        "decoder": plan.decoder,
        "reason": plan.reason,
        "device": plan.device,
        "device_name": _device_name(plan.device),
        "dtype": plan.dtype,
        "weights": plan.weights,
        "kv_dtype": plan.kv_dtype or plan.dtype,
        "num_threads": plan.num_threads,
    }


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def _noise(limits: Mapping[str, Record]) -> list[str]:
    return [
        f"the machine's {name} limit moved between {peak['lowest']:.1f} and {peak['highest']:.1f} "
        f"{peak['unit']} while this ran: something else uses it, so trust ratios, not milliseconds"
        for name, peak in limits.items()
        if peak["highest"] > NOISY * peak["lowest"]
    ]
