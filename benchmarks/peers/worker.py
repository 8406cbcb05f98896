"""The process in which one peer runs: loads it once, then answers requests, a line of JSON each.

    python benchmarks/peers/worker.py '{"peer": "llama_cpp", "folder": ..., ...}'  # a Job's fields

Its first line says which version it is, or why it cannot run. Then it answers requests,
{"prompts": [[...], ...], "new_tokens": 96}, by {"seconds": ..., "ids": ...}: the greedy
continuations, ids in and ids out, and the seconds of all of it. Between requests it waits for its
standard input, using no processor. bench_peers.py starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

Ids = list[list[int]]
Generate = Callable[[Ids, int], Ids]  # prompts, new tokens


@dataclass(frozen=True)
class Job:
    """What a peer is to run.

    Attributes:
        peer: the module `{peer}_peer`, which has PRECISIONS, version() and load(job).
        folder: the checkpoint; a peer may write its own form of it to `scratch`.
        precision: "float32", "bfloat16" or "int8"; the peer takes what is nearest.
        batch, max_len: the most rows, and tokens of a row, that there will be.
        decoder: fastgen's own, of fastgen.load.
    """

    peer: str
    folder: Path
    scratch: Path
    precision: str
    threads: int
    batch: int
    max_len: int
    decoder: str


def main() -> None:
    fields = json.loads(sys.argv[1])
    job = Job(**{**fields, "folder": Path(fields["folder"]), "scratch": Path(fields["scratch"])})
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    answers = _own_output()
    job.scratch.mkdir(parents=True, exist_ok=True)
    try:
        peer = importlib.import_module(f"{job.peer}_peer")
        if job.precision not in peer.PRECISIONS:
            _say(answers, unsupported=job.precision)
            return
        generate: Generate = peer.load(job)
    except ModuleNotFoundError as error:
        _say(answers, absent=error.name)
        return
    except Exception as error:
        _say(answers, failed=f"{type(error).__name__}: {error}")
        raise
    _say(answers, version=peer.version())
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        ids = generate(request["prompts"], request["new_tokens"])
        _say(answers, seconds=time.perf_counter() - start, ids=ids)


def _own_output() -> TextIO:
    """Standard output for our lines alone: what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    sys.modules["worker"] = sys.modules["__main__"]  # as peers know it
    main()
