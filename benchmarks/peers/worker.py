"""The process in which one peer runs: loads it once, then answers requests, a line of JSON each.

    python worker.py '{"peer": "llama_cpp", "folder": ..., ...}'  # a Job's fields

Its first line is {"version": ..., "load_seconds": ...}, or why the peer cannot run: "absent", the
module that is missing; "unsupported", what it does not have; "failed", the error. Then it answers
requests, {"prompts": [[...], ...], "new_tokens": 96}, by {"seconds": ..., "ids": ...,
"peak_bytes": ...}: the greedy continuations, ids in and ids out; the seconds of all of it; and the
most memory there has been since loading began, or null where that cannot be known. A request may
have "options", the peer's own. Between requests it waits for its standard input, using no
processor.

Needs the standard library and the peer's packages: neither fastgen nor a path to it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

Ids = list[list[int]]
Generate = Callable[..., Ids]  # of prompts, new tokens, and the peer's own options


@dataclass(frozen=True)
class Job:
    """What a peer is to run.

    Attributes:
        peer: the module `{peer}_peer`, which has PRECISIONS, DEVICES, version() and load(job); if
            it needs another form of the checkpoint, also convert(job), which writes scratch/MODEL.
        folder, scratch: the checkpoint, and where such a form stays for other processes.
        precision: "float32", "bfloat16" or "int8"; the peer takes what is nearest.
        batch, max_len: the most rows, and tokens of a row, that there will be.
        device: "cpu", "cuda" or "cuda:1".
        load: fastgen's own options of fastgen.load.
        exact: tokens are to be compared: nothing is kept in less than `precision`, which else is a
            peer's own choice where it has one (keys and values).
    """

    peer: str
    folder: Path
    scratch: Path
    precision: str
    threads: int
    batch: int
    max_len: int
    device: str = "cpu"
    load: dict[str, Any] = field(default_factory=dict)
    exact: bool = False


def parse_job(text: str) -> Job:
    fields = json.loads(text)
    return Job(**{**fields, **{name: Path(fields[name]) for name in ("folder", "scratch")}})


def find_peer(job: Job) -> ModuleType:
    """The peer's module, imported where its libraries see how many threads they may use."""
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    here = str(Path(__file__).resolve().parent)
    if here not in sys.path:  # as under PYTHONSAFEPATH
        sys.path.insert(0, here)
    return importlib.import_module(f"{job.peer}_peer")


def convert(peer: ModuleType, job: Job) -> None:
    """Once for all processes, in one of its own: what it takes is not part of loading."""
    if not hasattr(peer, "convert") or (job.scratch / peer.MODEL).exists():
        return
    job.scratch.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(peer.convert, job).result()


def watch_memory(device: str) -> None:
    """From now on peak_bytes counts."""
    if device != "cpu":
        return  # PyTorch's peak counts from the first allocation, which is loading's
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident


def peak_bytes(device: str) -> int | None:
    """Of the process on a CPU; on a GPU of PyTorch's allocator, None if the peer has another."""
    if device != "cpu":
        torch = sys.modules.get("torch")
        return (torch.cuda.max_memory_allocated(device) or None) if torch else None
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    answers = _own_output()
    job = parse_job(sys.argv[1])
    try:
        peer = find_peer(job)
        kind = job.device.partition(":")[0]
        if job.precision not in peer.PRECISIONS or kind not in peer.DEVICES:
            _say(answers, unsupported=f"{job.precision} on {job.device}")
            return
        convert(peer, job)
        watch_memory(job.device)
        start = time.perf_counter()
        generate: Generate = peer.load(job)
        load_seconds = time.perf_counter() - start
    except ModuleNotFoundError as error:
        _say(answers, absent=error.name)
        return
    except Exception as error:
        _say(answers, failed=f"{type(error).__name__}: {error}")
        raise
    _say(answers, version=peer.version(), load_seconds=load_seconds)
    _answer_requests(answers, generate, job.device)


def _answer_requests(answers: TextIO, generate: Generate, device: str) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        ids = generate(request["prompts"], request["new_tokens"], **request.get("options", {}))
        seconds = time.perf_counter() - start
        _say(answers, seconds=seconds, ids=ids, peak_bytes=peak_bytes(device))


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
