"""Latency of a served model against offered load: Poisson arrivals, open loop.

    python benchmarks/bench_serving.py --rates 1,2,4,8 --requests 60 --save
    python benchmarks/bench_serving.py --targets "fastgen serve,OpenVINO GenAI" \\
        --python openvino=OTHER/bin/python

For each load in turn, and within it for each target in turn: time to the first token and between
tokens, at the middle and at the 99th of a hundred, and the requests a second that came in good time
(first token within a second, then at most 100 ms a token). The client runs on the same processor.

Besides: what the asyncio engine adds to the decoder's own steps at batch 8.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from models import NEW, PRECISIONS, PROMPT, add_choice, names
from open_loop import arrivals, drive, summary
from serving_targets import TARGETS, Work
from timed_decoder import TimedDecoder

import fastgen
from fastgen.bench import interleave
from fastgen.bench.shapes import SHAPES, random_prompts, save_checkpoint

GOOD = {"first_token": 1.0, "gap": 0.1}  # seconds
LIMIT = 60  # seconds after the last arrival
BATCH = 8

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float32")
    parser.add_argument("--rates", default="0.5,1,2,4", help="requests a second")
    parser.add_argument("--requests", type=int, default=40, help="of each load")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    add_choice(parser, "--targets", ",".join([*TARGETS][:3]), TARGETS)
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH",
        help="the interpreter that has llama_cpp or openvino (see bench_peers.py)",
    )  # fmt: skip
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_checkpoint(Path(scratch) / "model", SHAPES[options.shape])
        loads = asyncio.run(_all_loads(folder, options))
        overhead = _engine_over_decoder(folder, PRECISIONS[options.precision], rounds=5)
    _print(loads)
    print(f"engine over decoder at batch {BATCH}: {overhead}")
    record = {
        "shape": options.shape,
        "precision": options.precision,
        "prompt_tokens": PROMPT,
        "new_tokens": options.new_tokens,
        "good": GOOD,
        "loads": loads,
        "engine_over_decoder": overhead,
    }
    harness.report("bench_serving", record, save=options.save, packages=["transformers", "uvicorn"])


async def _all_loads(folder: Path, options: argparse.Namespace) -> list[Record]:
    python = dict(pair.split("=", 1) for pair in options.python)
    work = Work(folder, options.precision, PROMPT + options.new_tokens, python)
    found: list[Record] = []
    rng = np.random.default_rng(0)
    for round_index in range(options.rounds):
        for rate in map(float, names(options.rates)):
            due = arrivals(rate, options.requests, seed=round_index)
            prompts = random_prompts(options.requests, PROMPT, rng)
            for name in options.targets:
                async with TARGETS[name](work) as send:
                    await drive(send, prompts[:1], options.new_tokens, [0.0], LIMIT)  # warm
                    start = time.perf_counter()
                    outcomes = await drive(send, prompts, options.new_tokens, due, LIMIT)
                    seconds = time.perf_counter() - start
                found.append({"target": name, "rate": rate, **summary(outcomes, seconds, **GOOD)})
                _print(found[-1:])
    return found


def _engine_over_decoder(folder: Path, load: Record, rounds: int) -> float:
    """The time of eight streams through AsyncEngine over that of their steps in the decoder."""
    rng = np.random.default_rng(1)
    ratios: list[float] = []
    room = {"max_batch_size": BATCH, "max_seq_len": PROMPT + NEW, "speculate": "off"}
    with fastgen.load(folder, **load, **room) as model:
        timed = model.engine.decoder = TimedDecoder(model.engine.decoder)
        params = fastgen.SamplingParams(temperature=0, max_new_tokens=NEW, ignore_eos=True)

        async def read(engine: fastgen.AsyncEngine, prompt: list[int]) -> None:
            async for _ in engine.stream(prompt, params):
                pass

        async def measure() -> None:
            async with fastgen.AsyncEngine(model) as engine:
                for _ in range(rounds + 1):
                    timed.seconds, start = 0.0, time.perf_counter()
                    prompts = random_prompts(BATCH, PROMPT, rng)
                    await asyncio.gather(*(read(engine, prompt) for prompt in prompts))
                    ratios.append((time.perf_counter() - start) / timed.seconds)

        asyncio.run(measure())
    return round(interleave.median(ratios[1:]), 4)


def _print(loads: list[Record]) -> None:
    for line in loads:
        print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
