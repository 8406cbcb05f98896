"""The CPU decoder against the machine's own limits: decode steps and prefills of GPT-2's shapes.

    python benchmarks/bench_cpu.py [--shapes 124M] [--dtypes int8] [--rounds 5] [--save]

Decode: rows with a prompt of 32 random tokens, then 96 greedy steps, timed as one block; the steps
alone, without an engine. Prefill: one row, in chunks as large as the decoder takes, logits wanted
only behind the last token. Between any two measurements stand the read bandwidth and the
multiply-add peaks, measured natively (peaks.py); a measurement's limit (roofline.py) is computed
from those before and behind it. Shares are formed within a round; medians of the rounds are shown.
(The tiny shape is for trying this out: its weights stay in the cache, which no limit here counts.)
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import roofline
from models import NEW, PROMPT, Precision, Shape
from peaks import KINDS, Peak, Peaks
from roofline import Speeds, Step
from rows import Rows

import fastgen
from fastgen.decoders.interface import Decoder
from fastgen.machine import granted_cores

SETTLE = 0.01  # seconds in which the decoder's threads go to sleep

Seconds = dict[str, float]  # of each peak's measurement


@dataclass
class Work:
    """Something to measure: steps that have a limit, and what each round saw."""

    name: dict[str, Any]
    steps: list[Step]
    tokens: int  # decoded or prefilled
    measure: harness.Measure
    rounds: list[tuple[float, Speeds]] = field(default_factory=list)  # seconds, and the machine's

    def record(self, blocks: int) -> dict[str, Any]:
        """What is shown of it; milliseconds are those of one of the `blocks` that it has."""
        taken = [seconds for seconds, _ in self.rounds]
        speeds = [each for _, each in self.rounds]
        limits = [roofline.limit(self.steps, each) for each in speeds]
        shares = [limit / seconds for limit, seconds in zip(limits, taken, strict=True)]
        return {
            **self.name,
            "milliseconds": round(harness.median(taken) / blocks * 1e3, 3),
            "limit_milliseconds": round(harness.median(limits) / blocks * 1e3, 3),
            "share": round(harness.median(shares), 3),
            "share_lowest": round(min(shares), 3),
            "share_highest": round(max(shares), 3),
            "tokens_per_s": round(self.tokens / harness.median(taken), 1),
            "read_gb_per_s": round(harness.median(each.read for each in speeds) / 1e9, 1),
            "linear_gmacs_per_s": round(harness.median(each.linear for each in speeds) / 1e9, 1),
            "attention_gmacs_per_s": round(
                harness.median(each.attention for each in speeds) / 1e9, 1
            ),
        }


def decode_work(
    decoder: Decoder, shape: Shape, precision: Precision, batch: int, rng: np.random.Generator
) -> Work:
    rows = Rows(decoder, batch, PROMPT + NEW)
    batches = rows.decode_batches(PROMPT, NEW)

    def measure() -> float:
        prompts = models.random_prompts(batch, PROMPT, rng)
        rows.bind(prompts, temperature=0)
        rows.run(rows.prefill_batches(prompts))
        seconds = rows.seconds(batches)
        rows.release()
        return seconds

    contexts = range(PROMPT + 1, PROMPT + NEW + 1)
    steps = [roofline.decode_step(shape, precision, batch, context) for context in contexts]
    return Work({"work": "decode", "size": batch}, steps, batch * NEW, measure)


def prefill_work(
    decoder: Decoder, shape: Shape, precision: Precision, length: int, rng: np.random.Generator
) -> Work:
    rows = Rows(decoder, 1, length)

    def measure() -> float:
        prompts = models.random_prompts(1, length, rng)
        rows.bind(prompts, temperature=0)
        seconds = rows.seconds(list(rows.prefill_batches(prompts)))
        rows.release()
        return seconds

    chunk = decoder.limits.max_tokens
    steps = [
        roofline.prefill_step(
            shape, precision, start, min(chunk, length - start), last=start + chunk >= length
        )
        for start in range(0, length, chunk)
    ]
    return Work({"work": "prefill", "size": length, "chunk": chunk}, steps, length, measure)


def speeds_between(
    peaks: dict[str, Peak], before: Seconds, after: Seconds, precision: Precision
) -> Speeds:
    """The machine's, over both measurements of each peak."""
    each = {name: 2 * peaks[name].amount / (before[name] + after[name]) for name in before}
    return Speeds(each["read"], each[precision.linear_peak], each[precision.attention_peak])


def take_rounds(
    works: list[Work], peaks: dict[str, Peak], precision: Precision, rounds: int
) -> None:
    """peaks, work, peaks, work, ..., peaks; the first round is not kept."""

    def probe() -> Seconds:
        time.sleep(SETTLE)
        return {name: peaks[name].seconds() for name in ("read", *precision.peaks)}

    for turn in range(1 + rounds):
        before = probe()
        for work in works:
            seconds, after = work.measure(), probe()
            if turn > 0:
                speeds = speeds_between(peaks, before, after, precision)
                work.rounds.append((seconds, speeds))
            before = after


def measure(
    folder: Path, shape: Shape, precision: Precision, options: argparse.Namespace, **peaks: Peak
) -> Iterator[dict[str, Any]]:
    """Records of all decode works, then of all prefills, each with a decoder made for them."""
    rng = np.random.default_rng(1)
    load = {"decoder": options.decoder, "num_threads": options.threads, **precision.load}
    groups: list[tuple[Callable[..., Work], list[int], dict[str, int], int]] = []
    if sizes := options.batch_sizes:
        room = {"max_batch_size": max(sizes), "max_seq_len": PROMPT + NEW}
        groups.append((decode_work, sizes, room, NEW))
    if sizes := options.prefill:
        groups.append((prefill_work, sizes, {"max_batch_size": 1, "max_seq_len": max(sizes)}, 1))
    for make, sizes, room, blocks in groups:
        with fastgen.load(folder, **load, **room) as model:
            decoder = model.engine.decoder
            works = [make(decoder, shape, precision, size, rng) for size in sizes]
            take_rounds(works, peaks, precision, options.rounds)
        yield from (work.record(blocks) for work in works)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models.add_choice(parser, "--shapes", "124M,355M", models.SHAPES)
    models.add_choice(parser, "--dtypes", "float32,bfloat16,int8", models.PRECISIONS)
    parser.add_argument("--batch-sizes", type=models.numbers, default="1,2,4,8,16,32")
    parser.add_argument("--prefill", type=models.numbers, default="32,128,512,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--decoder", default="cpu", help="of fastgen.load (default: cpu)")
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    machine = Peaks(options.threads)
    kinds = {kind for name in options.dtypes for kind in models.PRECISIONS[name].peaks}
    peaks = {
        "read": machine.read(),
        **{kind: machine.multiply_add(kind) for kind in KINDS if kind in kinds},
    }
    print("limits:", ", ".join(f"{name} by {peak.how}" for name, peak in peaks.items()))
    print(f"{'shape':5} {'dtype':9} {'work':>12} {'ms':>9} {'limit':>9} {'share':>6} "
          f"{'lowest':>6} {'highest':>7} {'tokens/s':>9} {'GB/s':>6} {'GMAC/s':>7}")  # fmt: skip
    records = []
    with tempfile.TemporaryDirectory() as name:
        for shape, dtype in itertools.product(options.shapes, options.dtypes):
            folder = Path(name) / shape
            if not folder.exists():
                models.save_checkpoint(folder, models.SHAPES[shape])
            precision = models.PRECISIONS[dtype]
            for found in measure(folder, models.SHAPES[shape], precision, options, **peaks):
                records.append({"shape": shape, "dtype": dtype, **found})
                show(records[-1])
    machine.close()
    about = {
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "rounds": options.rounds,
        "threads": options.threads,
        "decoder": options.decoder,
        "limits": {name: peak.how for name, peak in peaks.items()},
    }
    harness.report("bench_cpu", {**about, "rows": records}, save=options.save, packages=["numpy"])


def show(row: dict[str, Any]) -> None:
    work = f"{row['work']} {row['size']}"
    print(f"{row['shape']:5} {row['dtype']:9} {work:>12} {row['milliseconds']:9.3f} "
          f"{row['limit_milliseconds']:9.3f} {row['share']:6.0%} {row['share_lowest']:6.0%} "
          f"{row['share_highest']:7.0%} {row['tokens_per_s']:9.1f} {row['read_gb_per_s']:6.1f} "
          f"{row['linear_gmacs_per_s']:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
