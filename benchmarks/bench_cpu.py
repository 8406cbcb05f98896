"""A decoder against the machine's own limits: decode steps and prefills of GPT-2's shapes.

    python benchmarks/bench_cpu.py [--shapes gpt2] [--dtypes int8] [--rounds 5] [--save]

Decode: rows with a prompt of 32 random tokens, then 96 greedy steps, timed as one block; the steps
alone, without an engine. Prefill: one row, in chunks as large as the decoder takes, logits wanted
only for the last token. Between any two measurements stand the read bandwidth and the
multiply-add peaks, measured natively (fastgen/bench/peaks.py); a measurement's limit (roofline.py)
is computed from those before and after it. Shares are formed within a round; medians of the rounds
are shown. `--save NAME` keeps the result as results/NAME.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
from models import NEW, PROMPT
from rows import Rows

import fastgen
from fastgen.bench import roofline
from fastgen.bench.hardware_peaks import HardwarePeaks, limits_of
from fastgen.bench.interleave import Measure, median
from fastgen.bench.roofline import Speeds, Step
from fastgen.bench.shapes import (
    SHAPES,
    Precision,
    Shape,
    random_prompts,
    save_checkpoint,
    weight_bytes,
)
from fastgen.decoders.interface import Decoder
from fastgen.decoders.machine import granted_cores

Record = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What is measured: a decoder, and what its limits follow from."""

    decoder: Decoder
    shape: Shape
    precision: Precision
    rng: np.random.Generator


@dataclass
class Work:
    """Something to measure: steps that have a limit, and what each round saw."""

    name: dict[str, Any]
    steps: list[Step]
    tokens: int  # decoded or prefilled
    blocks: int  # equal parts; milliseconds are those of one
    measure: Measure
    rounds: list[tuple[float, Speeds]] = field(default_factory=list)  # seconds, and the machine's

    def record(self) -> Record:
        taken = [seconds for seconds, _ in self.rounds]
        speeds = [each for _, each in self.rounds]
        limits = [roofline.limit(self.steps, each) for each in speeds]
        shares = [limit / seconds for limit, seconds in zip(limits, taken, strict=True)]
        return {
            **self.name,
            "milliseconds": round(median(taken) / self.blocks * 1e3, 3),
            "limit_milliseconds": round(median(limits) / self.blocks * 1e3, 3),
            "share": round(median(shares), 3),
            "share_lowest": round(min(shares), 3),
            "share_highest": round(max(shares), 3),
            "tokens_per_s": round(self.tokens / median(taken), 1),
            "read_gb_per_s": round(median(each.read for each in speeds) / 1e9, 1),
            "linear_gmacs_per_s": round(median(each.linear for each in speeds) / 1e9, 1),
            "attention_gmacs_per_s": round(median(each.attention for each in speeds) / 1e9, 1),
        }


def decode_work(model: Model, batch: int, prompt: int, new: int) -> Work:
    rows = Rows(model.decoder, batch, prompt + new)
    batches = rows.decode_batches(prompt, new)

    def measure() -> float:
        prompts = random_prompts(batch, prompt, model.rng)
        rows.bind(prompts, temperature=0)
        rows.run(rows.prefill_batches(prompts))
        seconds = rows.seconds(batches)
        rows.release()
        return seconds

    contexts = range(prompt + 1, prompt + new + 1)
    steps = [
        roofline.decode_step(model.shape, model.precision, batch, context) for context in contexts
    ]
    name = {"work": "decode", "size": batch, "context": prompt + new // 2}
    return Work(name, steps, batch * new, new, measure)


def prefill_work(model: Model, length: int) -> Work:
    rows = Rows(model.decoder, 1, length)

    def measure() -> float:
        prompts = random_prompts(1, length, model.rng)
        rows.bind(prompts, temperature=0)
        seconds = rows.seconds(list(rows.prefill_batches(prompts)))
        rows.release()
        return seconds

    chunk = model.decoder.limits.max_tokens
    steps = [
        roofline.prefill_step(
            model.shape,
            model.precision,
            start,
            min(chunk, length - start),
            last=start + chunk >= length,
        )
        for start in range(0, length, chunk)
    ]
    return Work({"work": "prefill", "size": length, "chunk": chunk}, steps, length, 1, measure)


def take_rounds(works: list[Work], limits: HardwarePeaks, rounds: int) -> None:
    """limits, work, limits, work, ..., limits; the first round is not kept."""
    for round_index in range(1 + rounds):
        before = limits.probe()
        for work in works:
            seconds, after = work.measure(), limits.probe()
            speeds = limits.speeds(before, after)
            if round_index > 0 and speeds is not None:
                work.rounds.append((seconds, speeds))
            before = after


def measure(
    folder: Path, shape: Shape, options: argparse.Namespace, dtype: str
) -> Iterator[Record]:
    """Records of all decode works, then of all prefills, each with a decoder made for them."""
    load = {"decoder": options.decoder, "num_threads": options.threads, **models.PRECISIONS[dtype]}
    groups: list[tuple[Callable[[Model], list[Work]], dict[str, int]]] = []
    prompt, new = options.prompt, options.new
    if sizes := options.batch_sizes:
        room = {"max_batch_size": max(sizes), "max_seq_len": prompt + new}
        groups.append((lambda model: [decode_work(model, n, prompt, new) for n in sizes], room))
    if lengths := options.prefill:
        room = {"max_batch_size": 1, "max_seq_len": max(lengths)}
        groups.append((lambda model: [prefill_work(model, n) for n in lengths], room))
    for make, room in groups:
        with fastgen.load(folder, **load, **room) as loaded:
            precision = Precision.of(loaded.plan)
            model = Model(loaded.engine.decoder, shape, precision, np.random.default_rng(1))
            works = make(model)
            with limits_of(loaded.plan, precision, weight_bytes(shape, precision)) as limits:
                take_rounds(works, limits, options.rounds)
                seen = limits.record()
        yield from (work.record() | {"limits": seen} for work in works)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models.add_choice(parser, "--shapes", "gpt2,gpt2-medium", SHAPES)
    models.add_choice(parser, "--dtypes", "float32,bfloat16,int8", models.PRECISIONS)
    parser.add_argument("--batch-sizes", type=models.numbers, default="1,2,4,8,16,32")
    parser.add_argument("--prefill", type=models.numbers, default="32,128,512,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--decoder", default="cpu", help="of fastgen.load (default: cpu)")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens before decoding")
    parser.add_argument("--new", type=int, default=NEW, help="decode steps")
    parser.add_argument("--save", nargs="?", const="bench_cpu", metavar="NAME",
        help="keep the result in results/")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = parsed()
    print(f"{'shape':11} {'dtype':9} {'work':>12} {'ms':>9} {'limit':>9} {'share':>6} "
          f"{'lowest':>6} {'highest':>7} {'tokens/s':>9} {'GB/s':>6} {'GMAC/s':>7}")  # fmt: skip
    records = []
    with tempfile.TemporaryDirectory() as name:
        for shape, dtype in itertools.product(options.shapes, options.dtypes):
            folder = Path(name) / shape
            if not folder.exists():
                save_checkpoint(folder, SHAPES[shape])
            for found in measure(folder, SHAPES[shape], options, dtype):
                records.append({"shape": shape, "dtype": dtype, **found})
                show(records[-1])
    about = {"prompt_tokens": options.prompt, "new_tokens": options.new, "rounds": options.rounds}
    about |= {"threads": options.threads, "decoder": options.decoder}
    name = options.save or "bench_cpu"
    harness.report(name, {**about, "rows": records}, save=bool(options.save), packages=["numpy"])


def show(row: dict[str, Any]) -> None:
    work = f"{row['work']} {row['size']}"
    print(f"{row['shape']:11} {row['dtype']:9} {work:>12} {row['milliseconds']:9.3f} "
          f"{row['limit_milliseconds']:9.3f} {row['share']:6.0%} {row['share_lowest']:6.0%} "
          f"{row['share_highest']:7.0%} {row['tokens_per_s']:9.1f} {row['read_gb_per_s']:6.1f} "
          f"{row['linear_gmacs_per_s']:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
