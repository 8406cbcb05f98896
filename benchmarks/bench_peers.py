"""fastgen against other engines: whole generations, ids in, ids out, each in a process of its own.

    python benchmarks/bench_peers.py [--peers fastgen,llama_cpp] \\
        [--python llama_cpp=OTHER/bin/python ...] [--rounds 5] [--save]

GPT-2 124M's shape with random weights; prompts of 32 random tokens, 96 new ones, greedy, at batch
1, 8 and 32. Every peer loads once a precision, taking of its own what is nearest to it; then they
take turns, A B A B, with the same prompts, new in each round. Timed is everything from the prompts'
ids to the last new ids, in the peer's process. Shown are medians of tokens a second; how
many times as fast the first peer is, as the median of the ratios within a round; and the share of
the 96 tokens that stand before the first one that is not the first peer's. A peer whose package is
missing is named, with its installation; --python says which interpreter has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
from models import NEW, PROMPT

WORKER = Path(__file__).parent / "peers" / "worker.py"
INSTALL = {
    "fastgen": "pip install .",
    "transformers": "pip install torch transformers",
    "ctranslate2": "pip install ctranslate2 safetensors",
    "llama_cpp": "pip install llama-cpp-python gguf safetensors",
    "openvino": "pip install openvino-genai 'optimum-intel[openvino]'",
}
SETTLE = 0.3  # seconds; some libraries' threads spin so long after their work

Ids = list[list[int]]


class Worker:
    """A peer's process (peers/worker.py)."""

    def __init__(self, python: str, job: dict[str, Any]) -> None:
        self.peer: str = job["peer"]
        self._process = subprocess.Popen(
            [python, str(WORKER), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ready = self._answer()  # its version, or why it cannot run

    def generate(self, prompts: Ids) -> tuple[float, Ids]:
        time.sleep(SETTLE)
        assert self._process.stdin is not None
        request = {"prompts": prompts, "new_tokens": NEW}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["ids"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.peer} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(options: argparse.Namespace, folder: Path, precision: str) -> Iterator[list[Worker]]:
    """A worker for each peer that can run; says which cannot."""
    with ExitStack() as stack:
        workers = []
        for peer in options.peers:
            job = {
                "peer": peer,
                "folder": str(folder),
                "scratch": str(folder.parent / f"{peer}-{precision}"),
                "precision": precision,
                "threads": options.threads,
                "batch": max(options.batch_sizes),
                "max_len": PROMPT + NEW,
                "decoder": options.decoder,
            }
            worker = Worker(options.python.get(peer, sys.executable), job)
            stack.callback(worker.close)
            if "version" in worker.ready:
                workers.append(worker)
                continue
            print(f"{precision:9} {peer} {why_not(peer, worker.ready)}", flush=True)
        yield workers


def why_not(peer: str, ready: dict[str, Any]) -> str:
    if "absent" in ready:
        return f"is absent, without {ready['absent']}: {INSTALL[peer]}"
    return f"failed: {ready['failed']}" if "failed" in ready else "does not have this precision"


def measure(workers: list[Worker], batch: int, rounds: int) -> dict[str, list[tuple[float, Ids]]]:
    """What each peer took and generated, round by round; the first is not kept."""
    rng = np.random.default_rng(batch)
    found: dict[str, list[tuple[float, Ids]]] = {worker.peer: [] for worker in workers}
    for turn in range(1 + rounds):
        prompts = models.random_prompts(batch, PROMPT, rng)
        for worker in workers:
            result = worker.generate(prompts)
            if turn > 0:
                found[worker.peer].append(result)
    return found


def records(found: dict[str, list[tuple[float, Ids]]], batch: int) -> Iterator[dict[str, Any]]:
    """A record for each peer, compared with the first."""
    name, first = next(iter(found.items()))
    for peer, results in found.items():
        seconds = [taken for taken, _ in results]
        ratios = [taken / base for taken, (base, _) in zip(seconds, first, strict=True)]
        shares = [
            agreement(row, expected)
            for (_, ids), (_, base) in zip(results, first, strict=True)
            for row, expected in zip(ids, base, strict=True)
        ]
        yield {
            "batch": batch,
            "peer": peer,
            "tokens_per_s": round(batch * NEW / harness.median(seconds), 1),
            "first": name,
            "first_is_faster": round(harness.median(ratios), 3),
            "agreement": round(sum(shares) / len(shares), 3),
        }


def agreement(ids: list[int], expected: list[int]) -> float:
    """The share of the tokens that stand before the first difference."""
    if len(ids) != NEW:
        raise RuntimeError(f"{len(ids)} new tokens instead of {NEW}")
    same = [a == b for a, b in zip(ids, expected, strict=True)]
    return (same.index(False) if False in same else NEW) / NEW


def show(row: dict[str, Any]) -> None:
    print(f"{row['dtype']:9} batch {row['batch']:2} {row['peer']:12} {row['tokens_per_s']:8.1f} "
          f"tokens/s, {row['first']} {row['first_is_faster']:5.2f} times as fast, "
          f"{row['agreement']:4.0%} of the tokens agree", flush=True)  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models.add_choice(parser, "--peers", ",".join(INSTALL), INSTALL)
    models.add_choice(parser, "--dtypes", ",".join(models.PRECISIONS), models.PRECISIONS)
    parser.add_argument("--shape", default="124M", choices=models.SHAPES)
    parser.add_argument("--batch-sizes", type=models.numbers, default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decoder", default="cpu", help="fastgen's (default: cpu)")
    interpreter = "the interpreter that runs a peer (default: this one)"
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH", help=interpreter
    )
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    options.python = dict(pair.split("=", 1) for pair in options.python)
    return options


def main() -> None:
    options = parsed()
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = models.save_checkpoint(Path(name) / "checkpoint", models.SHAPES[options.shape])
        for precision in options.dtypes:
            with running(options, folder, precision) as workers:
                versions |= {worker.peer: worker.ready["version"] for worker in workers}
                for batch in options.batch_sizes if workers else []:
                    for row in records(measure(workers, batch, options.rounds), batch):
                        rows.append({"dtype": precision, **row})
                        show(rows[-1])
    about = {"shape": options.shape, "prompt_tokens": PROMPT, "new_tokens": NEW}
    about |= {"threads": options.threads, "decoder": options.decoder, "rounds": options.rounds}
    record = {**about, "versions": versions, "rows": rows}
    harness.report("bench_peers", record, save=options.save, packages=["numpy"])


if __name__ == "__main__":
    main()
