"""Speculation against plain decoding, in turns, on the same requests; its tokens must be the same.

    python benchmarks/bench_speculation.py [--parts tasks,oracle,draft,peers] [--dtypes int8]
        [--batch-sizes 1,4,16] [--rounds 3] [--python PEER=PATH ...] [--save]

tasks: text that quotes the prompt, edits it, or follows a template; and free text, greedy where it
    loops least and most, and sampled (speculation_tasks.py), with the drafts that fastgen.load
    makes by itself.
oracle: drafts that are right with a given probability a token, from a function of the caller's.
draft: GPT-2 XL's shape in int8 with 124M's as its draft model, which agrees on DRAFT_RIGHT of the
    tokens: those get a `sequence_bias`, which both obey, towards what XL draws without any.
peers: transformers' and llama.cpp's prompt lookup on greedy tasks at batch 1, beside fastgen.

The model is the bundled one in 124M's shape (tools/widen_model.py), for `draft` random weights. A
turn takes requests that arrive together, from their prompts to their last tokens; its prompts and
texts are unknown to what went before. Medians of the rounds' ratios, with lowest and highest; the
first round is not kept, and short turns get more rounds. It fails where tokens are not those of
plain decoding.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import speculation_tasks as tasks
from speculation_peers import PEERS, peer_pairs
from speculation_runs import Oracle, Own, Pair, interleave, record_of, repeats
from speculation_tasks import NEW, Case, Texts

import fastgen
from fastgen.bench.shapes import SHAPES, VOCAB_SIZE, random_prompts, save_checkpoint
from fastgen.decoders.machine import granted_cores
from fastgen.frontends.generator import BUNDLED_MODEL, Generator

WIDEN = Path(__file__).parents[1] / "tools" / "widen_model.py"
RIGHT = (0.0, 0.5, 0.9, 1.0)  # of the oracle's drafts, a token
DRAFT_RIGHT = 0.6
DRAFT_OPTIONS = {"temperature": 1.0, "top_k": 50}  # random weights loop at once if greedy
GUESSED = ("quoting", "editing")
WANTED, WANTED_GUESSED, WANTED_DRAFT = 0.97, 2.0, 1.4  # times as fast; GUESSED at batch 1
COMPARED = ("quoting", "editing", "lists", "free")  # greedy, which peers can be asked for
MOST_TOKENS = tasks.LONGEST + tasks.LEAD + 1 + NEW

Record = dict[str, Any]
Cases = Sequence[Case]


@dataclass
class Run:
    """What was asked for, and where checkpoints may be written."""

    scratch: Path
    dtypes: Sequence[str]
    batches: Sequence[int]
    rounds: int
    seconds: float
    threads: int
    pythons: dict[str, str]

    @property
    def num_cases(self) -> int:
        """Enough for each batch, and for another one in each round at batch 1."""
        return max(*self.batches, 1 + self.rounds)

    def load(self, folder: Path, dtype: str, speculate: Any, **own: Any) -> Generator:
        model = fastgen.load(
            folder,
            num_threads=self.threads,
            max_batch_size=max(self.batches),
            max_seq_len=MOST_TOKENS,
            speculate=speculate,
            **models.PRECISIONS[dtype],
            **own,
        )
        model.warmup()  # measures what steps cost
        return model

    def checkpoint(self) -> Path:
        """The bundled model in GPT-2 124M's shape."""
        folder = self.scratch / "widened"
        if not folder.exists():
            subprocess.run([sys.executable, WIDEN, BUNDLED_MODEL, folder], check=True)
        return folder

    def random_checkpoint(self, shape: str) -> Path:
        folder = self.scratch / shape
        return folder if folder.exists() else save_checkpoint(folder, SHAPES[shape])

    @cached_property
    def cases(self) -> dict[str, list[Case]]:
        """Of each task; prompts of free text are chosen by what the bundled model makes of them,
        whose texts are those of the widened one."""
        count = self.num_cases
        with fastgen.load(dtype="float32", num_threads=self.threads) as model:
            assert model.tokenizer is not None
            texts = Texts(model.tokenizer, tasks.HELD_OUT.read_text())

            def greedy(prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
                options: Record = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
                found = model.generate(prompts, progress=False, **options)
                return [generation.completions[0].token_ids for generation in found]

            return {
                "quoting": tasks.quoting(texts, count),
                "editing": tasks.editing(texts, count),
                "lists": tasks.lists(texts, count),
                **tasks.free(texts, count, greedy),
            }


def measured(
    run: Run, pairs: Sequence[Pair], cases: Cases, batch: int, about: Record, wanted: float
) -> Iterator[Record]:
    """A record for each pair; `about` begins it."""
    turns = interleave(pairs, cases, batch, run.rounds, run.seconds)
    for pair in pairs:
        own = {"batch": batch, "wanted": wanted if pair.subject.exact else None}
        repeated = repeats(cases, turns[pair.baseline.name], batch)
        yield {**about, **own, **record_of(pair, turns), **repeated}


def wanted_of(task: str, batch: int) -> float:
    return WANTED_GUESSED if task in GUESSED and batch == 1 else WANTED


def in_tasks(run: Run) -> Iterator[Record]:
    folder, cases = run.checkpoint(), run.cases
    for dtype in run.dtypes:
        with run.load(folder, dtype, "off") as off, run.load(folder, dtype, "auto") as on:
            pair = Pair(Own("off", off.engine), Own("fastgen", on.engine))
            for task, own in cases.items():
                for batch in run.batches:
                    about = {"part": "tasks", "dtype": dtype, "task": task}
                    yield from measured(run, [pair], own, batch, about, wanted_of(task, batch))


def by_oracle(run: Run) -> Iterator[Record]:
    folder = run.checkpoint()
    for dtype in run.dtypes:
        oracle = Oracle(VOCAB_SIZE)
        with run.load(folder, dtype, "off") as off, run.load(folder, dtype, oracle) as on:
            baseline = Own("off", off.engine)
            pairs = [
                Pair(baseline, Own(f"oracle {right:g}", on.engine, oracle.spoiling(right)))
                for right in RIGHT
            ]
            cases = random_cases(run.num_cases, off.config.vocab_size, {"temperature": 0})
            for batch in run.batches:
                about = {"part": "oracle", "dtype": dtype, "task": "random prompts"}
                yield from measured(run, pairs, cases, batch, about, WANTED)


def with_draft_model(run: Run) -> Iterator[Record]:
    folder, draft = run.random_checkpoint("gpt2-xl"), run.random_checkpoint("gpt2")
    with (
        run.load(folder, "int8", "off") as off,
        run.load(folder, "int8", "auto", draft_model=draft) as on,
    ):
        plain, drafted = Own("off", off.engine), Own("124M as draft model", on.engine)
        cases = random_cases(run.num_cases, VOCAB_SIZE, DRAFT_OPTIONS)
        cases = agreed(cases, plain.take(cases, None).ids, DRAFT_RIGHT)
        for batch in run.batches:
            about = {"part": "draft", "dtype": "int8", "task": "XL, random weights"}
            wanted = WANTED_DRAFT if batch == 1 else WANTED
            yield from measured(run, [Pair(plain, drafted)], cases, batch, about, wanted)


def beside_peers(run: Run) -> Iterator[Record]:
    folder, cases = run.checkpoint(), run.cases
    for dtype in run.dtypes:
        with ExitStack() as stack:
            off = stack.enter_context(run.load(folder, dtype, "off"))
            on = stack.enter_context(run.load(folder, dtype, "auto"))
            pairs = [Pair(Own("off", off.engine), Own("fastgen", on.engine))]
            for peer in PEERS:
                scratch = run.scratch / f"{peer}-{dtype}"
                found = peer_pairs(
                    peer, run.pythons, stack, cases["free"][0], folder=str(folder),
                    scratch=str(scratch), precision=dtype, threads=run.threads,
                    max_len=MOST_TOKENS,
                )  # fmt: skip
                if isinstance(found, str):
                    yield {"part": "peers", "dtype": dtype, "engine": peer, "why_not": found}
                else:
                    pairs += found
            for task in COMPARED:
                about = {"part": "peers", "dtype": dtype, "task": task}
                yield from measured(run, pairs, cases[task], 1, about, wanted_of(task, 1))


PARTS = {
    "tasks": in_tasks,
    "oracle": by_oracle,
    "draft": with_draft_model,
    "peers": beside_peers,
}


def random_cases(count: int, vocab_size: int, options: Record) -> list[Case]:
    prompts = random_prompts(count, models.PROMPT, np.random.default_rng(3), vocab_size)
    sampled = options["temperature"] > 0
    return [
        Case(prompt, {**options, **({"seed": seed} if sampled else {})})
        for seed, prompt in enumerate(prompts)
    ]


def agreed(cases: Cases, texts: Sequence[list[int]], right: float) -> list[Case]:
    """Requests that are continued by these texts as before, with a bias towards a share of their
    tokens: on those another model that obeys it agrees."""
    rng = np.random.default_rng(4)
    found = []
    for case, text in zip(cases, texts, strict=True):
        taken = (rng.random(len(text)) < right).tolist()
        bias = tasks.bias_to(case.prompt, text, taken)
        found.append(Case(case.prompt, {**case.options, "sequence_bias": bias}))
    return found


def show(row: Record) -> None:
    if "why_not" in row:
        print(f"{row['dtype']:8} {row['engine']}: {row['why_not']}", flush=True)
        return
    faster, per_step = row["times_faster"], row.get("tokens_per_step")
    missed = row["wanted"] is not None and faster["median"] < row["wanted"]
    print(
        f"{row['dtype']:8} {row['task']:18} {row['batch']:3} {row['engine']:22} "
        f"{row['tokens_per_s']:8.1f} {row['without']:8.1f} {faster['median']:6.2f} "
        f"{faster['lowest']:6.2f} {faster['highest']:6.2f} "
        f"{'-' if per_step is None else format(per_step, '.2f'):>6} "
        f"{_percent(row.get('acceptance')):>6} {_percent(row['same_rows']):>6} "
        f"{_percent(row['repeats_prompt']):>6} {_percent(row['repeats_itself']):>6}"
        f"{'  missed ' + format(row['wanted'], 'g') if missed else ''}",
        flush=True,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models.add_choice(parser, "--parts", ",".join(PARTS), PARTS)
    models.add_choice(parser, "--dtypes", ",".join(models.PRECISIONS), models.PRECISIONS)
    parser.add_argument("--batch-sizes", type=models.numbers, default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0,
        help="that each side is to run at least, by more rounds (default: 4)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=granted_cores())
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH",
        help=f"the interpreter that has a peer: {', '.join(PEERS)}")  # fmt: skip
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    pythons = dict(each.split("=", 1) for each in options.python)
    print(f"{'':8} {'task':18} {'':3} {'':22} {'tokens/s':>8} {'without':>8} {'faster':>6} "
          f"{'lowest':>6} {'high':>6} {'a step':>6} {'right':>6} {'same':>6} {'prompt':>6} "
          f"{'itself':>6}")  # fmt: skip
    about, rows = {"new_tokens": NEW, "threads": options.threads}, list[Record]()
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name), options.dtypes, options.batch_sizes, options.rounds,
                  options.seconds, options.threads, pythons)  # fmt: skip
        for part in options.parts:
            for row in PARTS[part](run):
                rows.append(row)
                show(row)
            if options.save:  # an hour's work is not lost if a later part fails
                harness.keep("bench_speculation", {**about, "rows": rows}, packages=["numpy"])
    harness.report("bench_speculation", {**about, "rows": rows}, save=options.save,
                   packages=["numpy"])  # fmt: skip


if __name__ == "__main__":
    main()
