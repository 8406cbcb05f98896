"""Parts of bench_around.py that run in this process: the engine's own time, and sampling options.

Engine: whole calls of `generate`, less the decoder's own steps, over the number of steps: queueing,
admission, binding, scheduling and handing out, and with text the tokenizer. A line is fitted
through what it is at 1, 8 and 32 rows. Once more without a decoder: what a step leaves of the
caches is part of what the engine costs.

Sampling: 96 decode steps of the decoder alone, with one set of options after the other in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from models import NEW, PRECISIONS, PROMPT
from rows import Rows
from timed_decoder import InstantDecoder, TimedDecoder

import fastgen
from fastgen.bench import interleave
from fastgen.bench.shapes import random_prompts

Record = dict[str, Any]
Options = dict[str, Any]
Prompts = Callable[[int], list[Any]]  # so many new ones

HELD_OUT = Path(__file__).parents[1] / "tests" / "data" / "held_out.txt"
PROMPT_CHARS = 100
ROWS = (1, 8, 32)
SAMPLING_BATCHES = (1, 32)
SAMPLING: dict[str, Options] = {
    "greedy": {"temperature": 0},
    "top_k=50, top_p=0.95": {"top_k": 50, "top_p": 0.95},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
    },
}


def engine_overhead(tiny: Path, load: Options, rounds: int) -> list[Record]:
    """Microseconds a step that the engine adds, for ids and for text."""
    rng = np.random.default_rng(2)
    text = HELD_OUT.read_text()

    def texts(count: int) -> list[str]:
        starts = rng.integers(0, len(text) - PROMPT_CHARS, count)
        return [text[start : start + PROMPT_CHARS] for start in starts]

    def ids(count: int) -> list[list[int]]:
        return random_prompts(count, PROMPT, rng)

    room = {"max_batch_size": max(ROWS), "max_seq_len": 2 * (PROMPT + NEW), "speculate": "off"}
    load = {**load, **room}
    with fastgen.load(tiny, **load) as model, fastgen.load(**load) as bundled:
        cases: dict[str, tuple[fastgen.Generator, Prompts, Options]] = {
            "ids": (model, ids, {}),
            "ids, no decoder": (model, ids, {}),
            "text": (bundled, texts, {}),
            "text with a stop string": (bundled, texts, {"stop": "\n\n\n"}),
        }
        kinds = {"ids, no decoder": InstantDecoder}
        measures = {}
        for case, (generator, prompts, options) in cases.items():
            for rows in ROWS:
                measures[f"{case}/{rows}"] = _overhead(
                    generator, prompts, rows, options, kinds.get(case, TimedDecoder)
                )
        seconds = interleave.interleave_calls(measures, rounds=rounds, warmups=2)
    return [_fitted(case, [seconds[f"{case}/{rows}"] for rows in ROWS]) for case in cases]


def sampling_cost(folder: Path, dtype: str, load: Options, rounds: int) -> Iterator[Record]:
    """A decode step's time with each set of options, and its ratio to a greedy one."""
    rng = np.random.default_rng(3)
    room = {
        "max_batch_size": max(SAMPLING_BATCHES), "max_seq_len": PROMPT + NEW, "speculate": "off",
    }  # fmt: skip
    with fastgen.load(folder, **load, **PRECISIONS[dtype], **room) as model:
        for batch in SAMPLING_BATCHES:
            rows = Rows(model.engine.decoder, batch, PROMPT + NEW)
            measures = {name: _decode(rows, options, rng) for name, options in SAMPLING.items()}
            seconds = interleave.interleave_calls(measures, rounds=rounds)
            for name, values in seconds.items():
                yield {
                    "dtype": dtype,
                    "batch": batch,
                    "options": name,
                    "step_milliseconds": round(interleave.median(values) / NEW * 1e3, 4),
                    "over_greedy": round(interleave.ratio(values, seconds["greedy"]), 4),
                }


def _overhead(
    generator: fastgen.Generator,
    prompts: Prompts,
    rows: int,
    options: Options,
    kind: type[TimedDecoder],
) -> interleave.Measure:
    """Seconds a step of a call of `generate`, without the decoder's."""

    def measure() -> float:
        many = prompts(rows)
        decoder = generator.engine.decoder
        timed = kind(decoder)
        generator.engine.decoder = timed
        try:
            start = time.perf_counter()
            generator.generate(many, max_new_tokens=NEW, ignore_eos=True, temperature=0, **options)
            return (time.perf_counter() - start - timed.seconds) / timed.steps
        finally:
            generator.engine.decoder = decoder

    return measure


def _fitted(case: str, seconds: list[list[float]]) -> Record:
    microseconds = [interleave.median(values) * 1e6 for values in seconds]
    a_row, a_step = np.polyfit(ROWS, microseconds, 1)
    return {
        "case": case,
        "step_microseconds": {
            str(rows): round(value, 2) for rows, value in zip(ROWS, microseconds, strict=True)
        },
        "fitted_a_step": round(float(a_step), 2),
        "fitted_a_row": round(float(a_row), 3),
    }


def _decode(rows: Rows, options: Options, rng: np.random.Generator) -> interleave.Measure:
    batches = rows.decode_batches(PROMPT, NEW)

    def measure() -> float:
        prompts = random_prompts(rows.count, PROMPT, rng)
        rows.bind(prompts, **options)
        rows.run(rows.prefill_batches(prompts))
        seconds = rows.seconds(batches)
        rows.release()
        return seconds

    return measure
