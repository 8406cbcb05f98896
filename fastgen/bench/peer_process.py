"""Other engines, each in a process of its own: which there are, and how they are talked to."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastgen.errors import EngineError

Ids = list[list[int]]

LAST_SECONDS = 10  # that a process is given to end by itself

INSTALL = {  # how a peer is installed
    "fastgen": "pip install fastgen",
    "transformers": "pip install torch transformers",
    "transformers_static": "pip install torch transformers, and a C++ compiler",
    "ctranslate2": "pip install ctranslate2 safetensors",
    "llama_cpp": "pip install llama-cpp-python gguf safetensors",
    "openvino": "pip install openvino-genai 'optimum-intel[openvino]', in an environment of its "
    "own; then --python openvino=ENVIRONMENT/bin/python",
    "onnxruntime": "pip install onnxruntime onnx safetensors",
}
_ANSWERS = {"version", "absent", "unsupported", "failed", "ids"}  # one of them is in each


class Generated(NamedTuple):
    """What a peer made of a batch of prompts.

    `seconds` are those of all of it, ids in and ids out; `peak_bytes` is the most memory that its
    process has taken since it began to load, None if it cannot tell.
    """

    seconds: float
    ids: Ids
    peak_bytes: int | None


@dataclass(frozen=True)
class Job:
    """What a peer is to run; see benchmarks/peers/worker.py, which reads this as JSON."""

    peer: str
    folder: str
    scratch: str
    precision: str
    device: str
    threads: int
    batch: int
    max_len: int
    load: dict[str, Any]
    exact: bool


class PeerError(EngineError):
    """A peer's process ended, or did not answer as it should."""

    code = "peer_failed"


class PeerProcess:
    """One peer, loaded; `ready` says which version it is, or why it cannot run."""

    def __init__(self, python: str, job: Job) -> None:
        self.peer = job.peer
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            try:
                self._process = subprocess.Popen(
                    [python, str(worker_path()), json.dumps(asdict(job))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    text=True,
                    start_new_session=True,  # with what it starts; Ctrl-C is ours to handle
                )
            except OSError as error:
                raise PeerError(f"{python} cannot be started: {error}") from error
            stack.callback(self._end)
            self.ready = self._answer()
            self._resources = stack.pop_all()

    @property
    def why_not(self) -> str | None:
        """Why it cannot run this; None if it can."""
        if "version" in self.ready:
            return None
        if "absent" in self.ready:
            return f"absent, without {self.ready['absent']}: {INSTALL[self.peer]}"
        if "failed" in self.ready:
            return f"failed: {self.ready['failed']}"
        return f"has no {self.ready['unsupported']}"

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
    ) -> Generated:
        """Greedy continuations; `options` are the peer's own.

        Raises:
            PeerError: it ended, or rows are not as many or as long as they should be.
        """
        assert self._process.stdin is not None
        request = {"prompts": prompts, "new_tokens": new_tokens, "options": options}
        with suppress(BrokenPipeError):  # it has ended, which its answer tells
            print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answer()
        lengths = {len(row) for row in answer["ids"]}
        if len(answer["ids"]) != len(prompts) or lengths != {new_tokens}:
            raise PeerError(
                f"{self.peer} made {len(answer['ids'])} rows of {sorted(lengths)} tokens instead "
                f"of {len(prompts)} of {new_tokens}"
            )
        return Generated(answer["seconds"], answer["ids"], answer.get("peak_bytes"))

    def close(self) -> None:
        """End the process, which does so when its input ends."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise PeerError(f"{self.peer} ended with status {status}{self._last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not _ANSWERS & set(answer):
            raise PeerError(f"{self.peer} answered {line.strip()[:80]!r}: is that its Python?")
        return answer

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # whatever is left of it
            self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def start(peer: str, pythons: Mapping[str, str], **fields: Any) -> PeerProcess:
    """The peer, in the interpreter that has it (by default, this one)."""
    return PeerProcess(pythons.get(peer, sys.executable), Job(peer=peer, **fields))


def worker_path() -> Path:
    """Its folder is `benchmarks/peers` in a checkout, fastgen.bench.peers where it is installed."""
    spec = importlib.util.find_spec("fastgen.bench.peers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("fastgen.bench.peers is missing: install fastgen again")
    return Path(next(iter(spec.submodule_search_locations))) / "worker.py"
