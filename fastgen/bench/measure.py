"""Whole requests through the engine, ids in and ids out, between measurements of the limits.

A round at batch B: B new random prompts arrive together, each draws the same number of tokens, and
the round ends with the last token. The times include scheduling, sampling and emitting tokens; they
exclude tokenizing, detokenizing and loading. The machine's limits are measured before and after,
and the round's own limit is computed from the steps that the engine made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from fastgen.bench import roofline
from fastgen.bench.hardware_peaks import HardwarePeaks
from fastgen.bench.interleave import median, percentile, ratios, spread
from fastgen.bench.recording import RecordingDecoder, StepSize, TokenClock
from fastgen.bench.roofline import Speeds
from fastgen.bench.shapes import Precision, Shape, random_prompts
from fastgen.errors import EngineError, RowFailedError
from fastgen.frontends.generator import Generator
from fastgen.sampling.params import SamplingParams

Record = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What each of a round's requests is."""

    prompt_len: int
    output_len: int
    params: SamplingParams


@dataclass(frozen=True)
class Round:
    """What one round saw, in seconds from when its prompts arrived.

    Attributes:
        tokens: of each row, when each of its tokens was handed out.
        prefill, decode: the steps up to the one that drew the last row's first token, and the rest.
    """

    tokens: list[list[float]]
    prefill: list[StepSize]
    decode: list[StepSize]

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.tokens)

    @property
    def prefill_seconds(self) -> float:
        """Until every row has its first token."""
        return max(times[0] for times in self.tokens)

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def num_decoded(self) -> int:
        """Tokens that came after every row had its first."""
        return sum(time > self.prefill_seconds for times in self.tokens for time in times)


@dataclass
class Rounds:
    """The rounds of one batch size, each with the machine's speeds around it, if they are known."""

    batch: int
    kept: list[tuple[Round, Speeds | None]] = field(default_factory=list)

    def record(self, shape: Shape, precision: Precision) -> Record:
        """Medians over rounds; percentiles over all their requests, or tokens."""

        def limit(sizes: Sequence[StepSize], speeds: Speeds | None) -> float:
            steps = (roofline.ragged_step(shape, precision, *size) for size in sizes)
            return math.nan if speeds is None else roofline.limit(steps, speeds)

        rounds = [each for each, _ in self.kept]
        rows = [times for each in rounds for times in each.tokens]
        gaps = [b - a for times in rows for a, b in pairwise(times)]
        prefill = [limit(each.prefill, speeds) for each, speeds in self.kept]
        decode = [limit(each.decode, speeds) for each, speeds in self.kept]
        whole = [a + b for a, b in zip(prefill, decode, strict=True)]
        tokens = self.kept[0][0].num_tokens
        return {
            "batch_size": self.batch,
            "ttft_ms": _percentiles([times[0] for times in rows]),
            "tpot_ms": _percentiles([mean_gap(times) for times in rows if len(times) > 1]),
            "itl_ms": _percentiles(gaps),
            "tokens_per_s": round(tokens / median(each.seconds for each in rounds), 1),
            "limit_tokens_per_s": _rounded(tokens / median(whole), 1),
            "decode_tokens_per_s": _median_rate(rounds),
            "share": _shares(whole, [each.seconds for each in rounds]),
            "prefill_share": _shares(prefill, [each.prefill_seconds for each in rounds]),
            "decode_share": _shares(decode, [each.decode_seconds for each in rounds]),
            "decode_bound": self._bound(shape, precision),
        }

    def _bound(self, shape: Shape, precision: Precision) -> str | None:
        """What bounds most of the last round's decode steps."""
        last, speeds = self.kept[-1]
        if speeds is None:
            return None
        steps = [roofline.ragged_step(shape, precision, *size) for size in last.decode]
        if not steps:
            return None
        reads = sum(step.reading(speeds) >= step.computing(speeds) for step in steps)
        return "memory" if 2 * reads >= len(steps) else "arithmetic"


def mean_gap(times: Sequence[float]) -> float:
    """Seconds an output token, after the first."""
    return (times[-1] - times[0]) / (len(times) - 1)


def take_rounds(
    model: Generator,
    work: Work,
    batches: Sequence[int],
    limits: HardwarePeaks,
    rounds: int,
    progress: Progress,
) -> list[Rounds]:
    """limits, batch 1, limits, batch 8, limits, ..., `rounds` times over; see `warm_up` first."""
    rng = np.random.default_rng(1)
    found = [Rounds(batch) for batch in batches]
    with recorded(model) as decoder:
        for round_index in range(rounds):
            before = limits.probe()
            for each in found:
                progress(f"round {round_index + 1} of {rounds}, batch {each.batch}")
                seen = run_once(model, decoder, work, each.batch, rng)
                after = limits.probe()
                each.kept.append((seen, limits.speeds(before, after)))
                before = after
    return found


def warm_up(model: Generator, work: Work, batches: Sequence[int], progress: Progress) -> None:
    """A round of each batch size that does not count, and checks that all rows run together."""
    rng = np.random.default_rng(0)
    model.warmup()
    with recorded(model) as decoder:
        for batch in batches:
            progress(f"warming up, batch {batch}")
            seen = run_once(model, decoder, work, batch, rng)
            together = max(len(size.new) for size in (*seen.prefill, *seen.decode))
            if together < min(batch, model.plan.limits.num_seats):
                raise ValueError(
                    f"of {batch} rows only {together} ran at a time: {model.plan.memory}; allow "
                    "more memory, or fewer rows"
                )


@contextmanager
def recorded(model: Generator) -> Iterator[RecordingDecoder]:
    """The model's decoder, meanwhile one that notes its steps."""
    engine, decoder = model.engine, model.engine.decoder
    recording = RecordingDecoder(decoder)
    engine.decoder = recording
    try:
        yield recording
    finally:
        engine.decoder = decoder


def run_once(
    model: Generator, decoder: RecordingDecoder, work: Work, batch: int, rng: np.random.Generator
) -> Round:
    """`batch` new prompts, to their last token.

    Raises:
        RowFailedError: a row ended otherwise than by its length.
    """
    engine = model.engine
    prompts = random_prompts(batch, work.prompt_len, rng, model.config.vocab_size)
    clocks = [TokenClock() for _ in prompts]
    decoder.sizes = []
    start = time.perf_counter()
    requests = [
        engine.add_request(prompt, work.params.with_seed(seed), listener=clock)
        for seed, (prompt, clock) in enumerate(zip(prompts, clocks, strict=True))
    ]
    engine.run(lambda: all(request.done for request in requests))
    for row in (row for request in requests for row in request.rows):
        if row.finish_reason != "length" or len(row.new_token_ids) != work.output_len:
            raise RowFailedError(f"a row ended with {row.finish_reason!r}: {row.error}")
    tokens = [[moment - start for moment in clock.times] for clock in clocks]
    cut = first_tokens_step(decoder.sizes, batch, work.prompt_len) + 1
    return Round(tokens, decoder.sizes[:cut], decoder.sizes[cut:])


def first_tokens_step(sizes: Sequence[StepSize], batch: int, prompt_len: int) -> int:
    """The step in which the last of the rows computes the end of its prompt."""
    ended = 0
    for at, size in enumerate(sizes):
        reached = size.cached + size.new
        ended += int(((size.cached < prompt_len) & (reached >= prompt_len)).sum())
        if ended == batch:
            return at
    raise EngineError(f"{ended} of {batch} prompts were computed")


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds."""
    if not seconds:
        return None
    return {f"p{share}": round(1e3 * percentile(seconds, share / 100), 3) for share in (50, 99)}


def _shares(limits: Sequence[float], seconds: Sequence[float]) -> dict[str, float] | None:
    """Of the limit, within each round."""
    if min(seconds) <= 0 or not max(limits) > 0:  # there was no such step, or no limit is known
        return None
    return spread(ratios(limits, seconds))


def _rounded(value: float, digits: int) -> float | None:
    return None if math.isnan(value) else round(value, digits)


def _median_rate(rounds: Sequence[Round]) -> float | None:
    """Tokens a second once every row has its first."""
    rates = [each.num_decoded / each.decode_seconds for each in rounds if each.decode_seconds > 0]
    return round(median(rates), 1) if rates else None
