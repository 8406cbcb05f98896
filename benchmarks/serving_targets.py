"""What bench_serving.py loads: the engine in this process, and servers in their own processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import PRECISIONS
from open_loop import Send

import fastgen

HERE = Path(__file__).parent
MOST_ROWS = 32
START = 180  # seconds for a server to load its model


@dataclass(frozen=True)
class Work:
    """What is served: a checkpoint, in a precision, and how long rows become.

    `python`: interpreters that have a peer, by its name; else this one.
    """

    folder: Path
    precision: str
    max_len: int
    python: dict[str, str]

    @property
    def load(self) -> dict[str, Any]:
        return PRECISIONS[self.precision]


@contextlib.asynccontextmanager
async def in_process(work: Work) -> AsyncIterator[Send]:
    """AsyncEngine, ids in and ids out."""
    room = {"max_batch_size": MOST_ROWS, "max_seq_len": work.max_len, "speculate": "off"}
    with fastgen.load(work.folder, **work.load, **room) as model:
        async with fastgen.AsyncEngine(model) as engine:

            async def send(prompt: list[int], new_tokens: int) -> AsyncIterator[None]:
                params = fastgen.SamplingParams(
                    temperature=0, max_new_tokens=new_tokens, ignore_eos=True
                )
                async with engine.stream(prompt, params) as stream:
                    async for piece in stream:
                        for _ in piece.token_ids:
                            yield

            yield send


@contextlib.asynccontextmanager
async def fastgen_server(work: Work) -> AsyncIterator[Send]:
    """`fastgen serve`."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in work.load.items()]
    command = [
        *(sys.executable, "-m", "fastgen", "serve", "--port", "0", "--speculate", "off"),
        *(f"--model=model={work.folder}", f"--max-batch-size={MOST_ROWS}"),
        *(f"--max-seq-len={work.max_len}", "--log-level=warning"),
        *options,
    ]
    async with _server(command) as address:
        yield client(*address, {"ignore_eos": True, "return_token_ids": True})


def peer(name: str, rows: int = 1) -> Callable[[Work], AbstractAsyncContextManager[Send]]:
    """A peer served by peers/token_server.py, `rows` at a time."""

    @contextlib.asynccontextmanager
    async def target(work: Work) -> AsyncIterator[Send]:
        scratch = work.folder.parent / f"{name}-{work.precision}"
        scratch.mkdir(exist_ok=True)
        job = {"peer": name, "folder": str(work.folder), "scratch": str(scratch),
               "precision": work.precision, "threads": len(os.sched_getaffinity(0)),
               "batch": rows, "max_len": work.max_len}  # fmt: skip
        python = work.python.get(name, sys.executable)
        command = [python, str(HERE / "peers" / "token_server.py"), json.dumps(job)]
        async with _server(command) as address:
            yield client(*address, {})

    return target


TARGETS = {
    "in-process": in_process,
    "fastgen serve": fastgen_server,
    "transformers with a lock": peer("transformers"),
    "llama.cpp with a lock": peer("llama_cpp"),
    "OpenVINO GenAI": peer("openvino", MOST_ROWS),
}


@contextlib.asynccontextmanager
async def _server(command: list[str]) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a server that tells them on its standard output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    try:
        yield await asyncio.wait_for(_address(process, command), START)
    finally:
        process.terminate()
        await process.wait()


async def _address(process: asyncio.subprocess.Process, command: list[str]) -> tuple[str, int]:
    assert process.stdout is not None
    async for line in process.stdout:
        if found := re.search(rb"at http://([\d.]+):(\d+)", line):
            return found[1].decode(), int(found[2])
    raise RuntimeError(f"it ended before it served; to see why: {shlex.join(command)}")


def client(host: str, port: int, extra: dict[str, Any]) -> Send:
    """Streams over a connection of its own: no more than what HTTP needs, to leave the processor to
    the server."""

    async def send(prompt: list[int], new_tokens: int) -> AsyncIterator[None]:
        request = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
                   "stream": True, **extra}  # fmt: skip
        body = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(status.decode().strip())
            async for line in reader:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    if choices is None:
                        raise RuntimeError(line.decode()[:200])
                    for _ in choices[0].get("token_ids", [0]) if choices else ():
                        yield
        finally:
            writer.close()

    return send
