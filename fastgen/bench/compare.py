"""fastgen and other engines on the same work, each in a process of its own, A B A B.

First each peer's greedy tokens in float32 are compared with fastgen's. A peer that draws other
tokens where no two candidates are nearly equal computes another model, and is not timed. Then all
load the model in the requested precision and run interleaved, with new prompts in each round. A
whole batch is timed, from its prompts' ids to its last new ids, in the peer's process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.bench.interleave import median, ratios, spread
from fastgen.bench.peer_process import Generated, Ids, PeerError, PeerProcess, start
from fastgen.bench.shapes import random_prompts
from fastgen.frontends.generator import load

Record = dict[str, Any]
Progress = Callable[[str], None]

SETTLE = 0.3  # seconds; some libraries' threads spin so long after their work
CHECKED_ROWS, CHECKED_TOKENS = 4, 32
CANDIDATES = 5  # of fastgen's own, in which a peer's token is looked for
CLOSE = 0.1  # nats: may swap by rounding; 0.03 were seen, of llama.cpp's GELU in float16 tables


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        folder: the checkpoint; `scratch` is where peers may write their own forms of it.
        precision: "float32", "bfloat16" or "int8"; a peer takes what is nearest to it.
        load: fastgen's own options of fastgen.load, besides those that stand here.
        pythons: the interpreters of peers that are not in this one's.
    """

    folder: Path
    scratch: Path
    peers: Sequence[str]
    pythons: Mapping[str, str]
    precision: str
    device: str
    load: Record
    threads: int
    batches: Sequence[int]
    prompt_len: int
    output_len: int
    rounds: int
    vocab: int

    def start(self, peer: str, precision: str, batch: int, *, exact: bool = False) -> PeerProcess:
        return start(
            peer,
            self.pythons,
            folder=str(self.folder),
            scratch=str(self.scratch / f"{peer}-{precision}"),
            precision=precision,
            device=self.device,
            threads=self.threads,
            batch=batch,
            max_len=self.prompt_len + self.output_len,
            load=self.load if peer == "fastgen" else {},
            exact=exact,
        )

    @property
    def about(self) -> Record:
        """What the record says of it."""
        return {"precision": self.precision, "device": self.device, "threads": self.threads}


def compare(job: Comparison, progress: Progress) -> Record:
    """`peers`: each one's state; `results`: a record for each batch size and peer that ran."""
    checked = check_tokens(job, progress)
    peers: dict[str, Record] = {}
    results: list[Record] = []
    with ExitStack() as stack:
        running: dict[str, PeerProcess] = {}
        for peer in ("fastgen", *job.peers):
            state = checked.get(peer, {})
            peers[peer] = dict(state)
            if "why_not" in state:
                continue
            progress(f"{peer} loads the model in {job.precision}")
            try:
                process = stack.enter_context(job.start(peer, job.precision, max(job.batches)))
            except PeerError as error:
                peers[peer]["why_not"] = f"failed: {error}"
                continue
            if process.why_not is not None:
                peers[peer]["why_not"] = process.why_not
                continue
            peers[peer] |= {
                "version": process.ready["version"],
                "load_seconds": round(process.ready["load_seconds"], 3),
            }
            running[peer] = process
        if "fastgen" not in running:
            raise PeerError(f"fastgen itself: {peers['fastgen']['why_not']}")
        for batch in job.batches:
            found = take_rounds(job, running, batch, progress)
            for peer, why in found.failed.items():
                peers[peer]["why_not"] = f"failed: {why}"
            results += records(found.rounds, batch, job.output_len)
    return {**job.about, "peers": peers, "results": results}


def check_tokens(job: Comparison, progress: Progress) -> dict[str, Record]:
    """Of each peer, how its float32 tokens agree with fastgen's, or why it is not timed."""
    prompts = random_prompts(CHECKED_ROWS, job.prompt_len, np.random.default_rng(2), job.vocab)
    new = min(CHECKED_TOKENS, job.output_len)
    own = own_candidates(job, prompts, new)
    found: dict[str, Record] = {}
    for peer in job.peers:
        progress(f"checking {peer}'s tokens in float32")
        try:
            with job.start(peer, "float32", CHECKED_ROWS, exact=True) as process:
                if process.why_not is not None:
                    found[peer] = {"why_not": process.why_not}
                    continue
                found[peer] = verdict(own, process.generate(prompts, new).ids)
        except PeerError as error:
            found[peer] = {"why_not": f"failed: {error}"}
        if job.precision != "float32":
            shutil.rmtree(job.scratch / f"{peer}-float32", ignore_errors=True)
    return found


Candidates = list[list[dict[int, float]]]  # of each row and place: log-probabilities, best first


def own_candidates(job: Comparison, prompts: Ids, new: int) -> Candidates:
    """fastgen's most likely ids along its own greedy rows, in float32."""
    with load(
        job.folder,
        dtype="float32",
        device=job.device,
        decoder=job.load.get("decoder", "auto"),
        num_threads=job.threads,
        max_batch_size=len(prompts),
        max_seq_len=job.prompt_len + new,
        cache=False,
        speculate="off",
    ) as model:
        options: Record = {"max_new_tokens": new, "ignore_eos": True, "temperature": 0}
        generations = model.generate(prompts, logprobs=CANDIDATES, progress=False, **options)
    rows = [generation.completions[0].logprobs or () for generation in generations]
    return [[dict(token.top) for token in row] for row in rows]


def verdict(own: Candidates, ids: Ids) -> Record:
    """Rows may differ from where a peer's token is nearly as likely as fastgen's best; tokens after
    that are not compared."""
    agreeing, farthest = 0, 0.0
    for candidates, row in zip(own, ids, strict=True):
        for top, token_id in zip(candidates, row, strict=True):
            best = max(top, key=lambda one: (top[one], -one))
            if token_id != best:
                farthest = max(farthest, top[best] - top.get(token_id, -np.inf))
                break
            agreeing += 1
    record: Record = {
        "tokens_agree": round(agreeing / sum(map(len, own)), 3),
        "parted_within_nats": round(farthest, 5) if np.isfinite(farthest) else None,
    }
    if farthest > CLOSE:
        record["why_not"] = (
            "its greedy tokens in float32 are not fastgen's, by more than rounding: it computes "
            "another model"
        )
    return record


@dataclass
class Found:
    """What each peer made in each round, and which failed."""

    rounds: dict[str, list[Generated]]
    failed: dict[str, str]


def take_rounds(
    job: Comparison, running: dict[str, PeerProcess], batch: int, progress: Progress
) -> Found:
    """A B C, A B C, ...; the first round is not kept. One that fails leaves `running`."""
    rng = np.random.default_rng(batch)
    found = Found({peer: [] for peer in running}, {})
    for round_index in range(1 + job.rounds):
        prompts = random_prompts(batch, job.prompt_len, rng, job.vocab)
        told = f"round {round_index} of {job.rounds}" if round_index else "warming up"
        for peer, process in list(running.items()):
            progress(f"comparing, batch {batch}, {told}: {peer}")
            time.sleep(SETTLE)
            try:
                generated = process.generate(prompts, job.output_len)
            except PeerError as error:
                if peer == "fastgen":
                    raise
                found.failed[peer] = str(error)
                del running[peer], found.rounds[peer]
                continue
            if round_index > 0:
                found.rounds[peer].append(generated)
    return found


def records(
    rounds: Mapping[str, Sequence[Generated]], batch: int, new_tokens: int
) -> Iterator[Record]:
    """One for each peer, compared with fastgen round by round."""
    own = rounds["fastgen"]
    for peer, made in rounds.items():
        seconds = [each.seconds for each in made]
        peaks = [each.peak_bytes for each in made if each.peak_bytes is not None]
        yield {
            "batch_size": batch,
            "peer": peer,
            "tokens_per_s": round(batch * new_tokens / median(seconds), 1),
            "fastgen_is_faster": spread(ratios(seconds, [each.seconds for each in own])),
            "peak_mb": round(max(peaks) / 2**20) if peaks else None,
            "tokens_agree": round(agreement(made, own, new_tokens), 3),
        }


def agreement(made: Sequence[Generated], own: Sequence[Generated], new_tokens: int) -> float:
    """The share of the tokens that stand before each row's first difference."""
    before = [
        next(
            (at for at, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b), new_tokens
        )
        for one, other in zip(made, own, strict=True)
        for row, expected in zip(one.ids, other.ids, strict=True)
    ]
    return sum(before) / (len(before) * new_tokens)
