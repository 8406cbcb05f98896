"""The CUDA decoder on the GPU that is there: steps against the card's limits, and against peers.

    python benchmarks/bench_gpu.py [--rounds 5] [--without-peers] [--out FOLDER] [--save]

GPT-2 124M with random weights in bfloat16. A step's time is that of 48 steps that follow each other
without the host looking, by the clock, from the first call until the last draw is there; medians of
several such runs count. The limits are the card's copy bandwidth (bytes read and written; once more
at the end) and its bfloat16 peak, both measured in the same run. Peers are transformers' generate,
eager and with a static cache and torch.compile. What is measured is written down at once, targets
first, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import triton
from rows import Rows

import fastgen
from fastgen.bench import interleave
from fastgen.bench.cuda_peaks import cuda_peaks
from fastgen.bench.machine import machine
from fastgen.bench.shapes import POSITIONS, SHAPES, Shape, random_prompts, save_checkpoint

STEPS = 48  # in one go; fewer than may be under way
GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
OTHERS: dict[str, dict[str, Any]] = {"temperature": {}, "top_p": {"top_p": 0.95}}
TARGETS = {
    "batch 1, context 256: microseconds a token": 200,
    "batch 256, context 512: share of the limit": 0.8,
    "batch 256, context 512, int8 KV: times as fast": 1.6,
    "prefill of 8 x 1024: share of the peak": 0.45,
    "sampled over greedy, at most": 1.05,
}


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of what `run` starts, until the device has done it."""

    def to_the_end() -> None:
        run()
        torch.cuda.synchronize()

    to_the_end()
    return interleave.median(interleave.timed(to_the_end)() for _ in range(rounds))


def card_limits(rounds: int) -> tuple[float, float]:
    """Bytes a second, read and written, and operations a second in bfloat16."""
    with cuda_peaks("cuda", ("bfloat16",)) as peaks:
        read, multiply = (
            interleave.median(peaks[name].measure() for _ in range(rounds))
            for name in ("read", "bfloat16")
        )
    return read, 2 * multiply


@contextmanager
def loaded(folder: Path, batch: int, **options: Any) -> Iterator[fastgen.Generator]:
    environment = {key: str(options.pop(key)) for key in list(options) if key.isupper()}
    os.environ.update(environment)
    try:
        with fastgen.load(
            folder, device="cuda", max_batch_size=batch, **{"dtype": "bfloat16", **options}
        ) as model:
            assert model.plan.decoder == "cuda", model.plan.reason
            yield model
    finally:
        for key in environment:
            del os.environ[key]


def step_seconds(
    model: fastgen.Generator, batch: int, context: int, rounds: int, sampling: dict[str, Any]
) -> float:
    """Seconds of a step of `batch` rows whose contexts are `context` long in the middle."""
    decoder = model.engine.decoder
    rows = Rows(decoder, batch, POSITIONS)
    first = context - STEPS // 2
    prompts = random_prompts(batch, first, np.random.default_rng(0))
    rows.bind(prompts, **sampling)
    rows.run(rows.prefill_batches(prompts))
    batches = rows.decode_batches(first, STEPS)

    def run() -> None:
        pending = [decoder.step(one) for one in batches]
        pending[-1].wait()

    seconds = median_seconds(run, rounds) / STEPS
    rows.release()
    return seconds


def prefill_seconds(model: fastgen.Generator, batch: int, length: int, rounds: int) -> float:
    rows = Rows(model.engine.decoder, batch, POSITIONS)
    prompts = random_prompts(batch, length, np.random.default_rng(0))
    rows.bind(prompts, **GREEDY)
    batches = list(rows.prefill_batches(prompts))
    seconds = median_seconds(lambda: rows.run(batches), rounds)
    rows.release()
    return seconds


def generate_rate(model: fastgen.Generator, batch: int, new: int = 128) -> float:
    """Tokens a second of the whole of `generate`, host and all."""
    rng = np.random.default_rng(1)  # other prompts each time: the same ones would be found
    options = {"max_new_tokens": new, "ignore_eos": True, "seed": 0, **SAMPLED}

    def run() -> None:
        model.generate(random_prompts(batch, 128, rng), **options)

    run()
    return batch * new / interleave.median(interleave.timed(run)() for _ in range(3))


def step_limit(shape: Shape, batch: int, context: int, kv_bytes: int, bandwidth: float) -> float:
    """Seconds that reading weights and KV takes."""
    kv_numbers = batch * context * shape.context
    scales = 4 * batch * context * 2 * shape.layers * shape.heads if kv_bytes == 1 else 0
    return (2 * (shape.linear + shape.head) + kv_bytes * kv_numbers + scales) / bandwidth


def prefill_operations(shape: Shape, batch: int, length: int) -> float:
    """The head only computes each row's last token."""
    attention = 2 * batch * length**2 * shape.context / 2  # causal
    return 2 * batch * (length * shape.linear + shape.head) + attention


def measure(folder: Path, shape: Shape, rounds: int, found: dict[str, Any]) -> Iterator[None]:
    """Fill `found`; yields whenever there is more in it."""
    bandwidth, peak = card_limits(rounds)
    found |= {"copy_bandwidth": bandwidth, "bf16_peak": peak}
    with loaded(folder, 1) as model:
        greedy = step_seconds(model, 1, 256, rounds, GREEDY)
        found["batch1_graph_pdl_us"] = 1e6 * greedy
        yield
        sampled = step_seconds(model, 1, 256, rounds, SAMPLED)
        found["batch1_sampled_us"] = 1e6 * sampled
        found["batch1_sampled_over_greedy"] = sampled / greedy
        found["generate_batch1_tokens_per_s"] = generate_rate(model, 1)
        yield
    with loaded(folder, 1, FASTGEN_PDL=0) as model:
        found["batch1_graph_us"] = 1e6 * step_seconds(model, 1, 256, rounds, GREEDY)
    yield
    with loaded(folder, 256) as model:
        greedy = step_seconds(model, 256, 512, rounds, GREEDY)
        found["batch256_us"] = 1e6 * greedy
        found["batch256_share"] = step_limit(shape, 256, 512, 2, bandwidth) / greedy
        yield
        prefill = prefill_seconds(model, 8, 1024, rounds)
        found["prefill_us"] = 1e6 * prefill
        found["prefill_share"] = prefill_operations(shape, 8, 1024) / prefill / peak
        sampled = step_seconds(model, 256, 512, rounds, SAMPLED)
        found["batch256_sampled_over_greedy"] = sampled / greedy
        found["generate_batch256_tokens_per_s"] = generate_rate(model, 256)
        yield
    with loaded(folder, 256, kv_dtype="int8") as model:
        int8 = step_seconds(model, 256, 512, rounds, GREEDY)
        found["batch256_int8_kv_us"] = 1e6 * int8
        found["batch256_int8_kv_share"] = step_limit(shape, 256, 512, 1, bandwidth) / int8
        found["batch256_int8_kv_speedup"] = greedy / int8
    yield


def more(folder: Path, shape: Shape, rounds: int, found: dict[str, Any]) -> Iterator[None]:
    """What no target speaks of."""
    for batch in (8, 32):
        with loaded(folder, batch) as model:
            seconds = step_seconds(model, batch, 512, rounds, GREEDY)
        found[f"batch{batch}_us"] = 1e6 * seconds
        limit = step_limit(shape, batch, 512, 2, found["copy_bandwidth"])
        found[f"batch{batch}_share"] = limit / seconds
        yield
    ways: dict[str, dict[str, Any]] = {
        "plain": {"FASTGEN_CUDA_GRAPHS": 0},
        "int8": {"quantize": "int8"},
        "float32": {"dtype": "float32"},
        "batch_invariant": {"batch_invariant": True},
    }
    for name, options in ways.items():
        with loaded(folder, 1, **options) as model:
            found[f"batch1_{name}_us"] = 1e6 * step_seconds(model, 1, 256, rounds, GREEDY)
        yield
    with loaded(folder, 1) as model:
        for name, sampling in OTHERS.items():
            found[f"batch1_{name}_us"] = 1e6 * step_seconds(model, 1, 256, rounds, sampling)
    found["copy_bandwidth_at_the_end"], _ = card_limits(rounds)
    yield


def peers(folder: Path, rounds: int, found: dict[str, Any]) -> Iterator[None]:
    """Microseconds a token of transformers' generate at batch 1, contexts 208 to 304."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    ids = torch.tensor(random_prompts(1, 208, np.random.default_rng(0)), device="cuda")
    options = {"do_sample": False, "max_new_tokens": 96, "min_new_tokens": 96, "pad_token_id": 0}
    for name, own in {"eager": {}, "static_compiled": {"cache_implementation": "static"}}.items():

        @torch.inference_mode()
        def run(own: dict[str, Any] = own) -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), **options, **own)

        try:
            run()
            run()
            found[f"transformers_{name}_us"] = 1e6 * median_seconds(run, min(3, rounds)) / 96
        except Exception as error:  # a peer that cannot run says so in the table
            found[f"transformers_{name}_error"] = str(error).splitlines()[0][:200]
        yield


def table(record: dict[str, Any]) -> str:
    lines = [f"{record['device']}, torch {record['torch']}, triton {record['triton']}", ""]
    for name, value in record["found"].items():
        shown = (
            value if isinstance(value, str) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        )
        lines.append(f"{name:<36} {shown:>20}")
    lines += ["", "targets (H100):", *(f"{value:>8}  {name}" for name, value in TARGETS.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for bench_gpu.json and bench_gpu.txt")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu.py needs an NVIDIA GPU")
    shape, found = SHAPES["gpt2"], {}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    record = {"device": torch.cuda.get_device_name(), **versions, "found": found}
    record |= machine()
    folders = [options.out, harness.RESULTS if options.save else None]
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), shape)
        parts = [measure(path, shape, options.rounds, found)]
        if not options.without_peers:
            parts.append(peers(path, options.rounds, found))
        parts.append(more(path, shape, options.rounds, found))
        for _ in itertools.chain(*parts):
            for out in [one for one in folders if one is not None]:
                out.mkdir(parents=True, exist_ok=True)
                (out / "bench_gpu.json").write_text(json.dumps(record) + "\n")
                (out / "bench_gpu.txt").write_text(table(record))
    print(table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
