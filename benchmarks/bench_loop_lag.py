"""How long a server's event loop keeps others waiting: under full load, and with large bodies.

    python benchmarks/bench_loop_lag.py --save

A task on the server's own loop sleeps for 5 ms again and again; how much later it wakes is the lag.
Clients run in a process of their own, on the same processor: 64 streams at once, one after another;
then the same beside bodies of 4 MiB: texts that are too long, lists of too many ids, and JSON that
is all brackets.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import harness
import numpy as np
from models import PRECISIONS, PROMPT
from serving_targets import client

import fastgen
from fastgen.bench.interleave import percentile
from fastgen.bench.shapes import SHAPES, random_prompts, save_checkpoint
from fastgen.server.run import Address, Server
from fastgen.server.service import Service

TICK = 0.005  # seconds
STREAMS, NEW_TOKENS = 64, 32
BODY = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float32")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        asyncio.run(_clients(**json.loads(options.client)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_checkpoint(Path(scratch) / "model", SHAPES[options.shape])
        room = {"max_batch_size": 32, "max_seq_len": 2 * PROMPT + NEW_TOKENS, "speculate": "off"}
        with fastgen.load(folder, **PRECISIONS[options.precision], **room) as model:
            lags = {
                name: _lag_of(model, options.seconds, bodies=bodies)
                for name, bodies in (("full load", False), ("with 4 MiB bodies", True))
            }
    for name, lag in lags.items():
        print(name, lag)
    record = {"shape": options.shape, "precision": options.precision, "lag_ms": lags}
    harness.report("bench_loop_lag", record, save=options.save, packages=["starlette", "uvicorn"])


def _lag_of(model: fastgen.Generator, seconds: float, *, bodies: bool) -> dict[str, float]:
    """Milliseconds at the middle, the 99th of a hundred, and the most."""
    server = Server(Service({"model": model}), Address(port=0))
    lags: list[float] = []

    async def probe() -> None:
        while not server.started:
            await asyncio.sleep(TICK)
        while not server.should_exit:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            lags.append(1e3 * (time.perf_counter() - due))

    async def both() -> None:
        await asyncio.gather(server.serve(), probe())

    thread = threading.Thread(target=asyncio.run, args=(both(),))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    asked = json.dumps({"port": port, "seconds": seconds, "bodies": bodies})
    subprocess.run([sys.executable, __file__, "--client", asked], check=True)
    server.should_exit = True
    thread.join()
    shares = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: round(percentile(lags, share), 2) for name, share in shares.items()}


async def _clients(port: int, seconds: float, bodies: bool) -> None:
    end = time.monotonic() + seconds
    rng = np.random.default_rng(0)
    send = client("127.0.0.1", port, {"ignore_eos": True, "return_token_ids": True})

    async def stream() -> int:
        done = 0
        while time.monotonic() < end:
            [prompt] = random_prompts(1, PROMPT, rng)
            async for _ in send(prompt, NEW_TOKENS):
                pass
            done += 1
        return done

    async def large() -> int:
        done = 0
        while time.monotonic() < end:
            for body in _large_bodies():
                await asyncio.to_thread(_post, port, body)
                done += 1
                await asyncio.sleep(0.1)
        return done

    work: list[Any] = [stream() for _ in range(STREAMS)]
    done = await asyncio.gather(*work, *([large()] if bodies else []))
    print(f"{sum(done[:STREAMS])} streams, {sum(done[STREAMS:])} large bodies", flush=True)


def _large_bodies() -> list[bytes]:
    shell = len(b'{"prompt": ""}')
    ids = b",".join([b"11"] * ((BODY - shell) // 3))
    return [
        b'{"prompt": "%s"}' % (b"word " * ((BODY - shell) // 5)),
        b'{"prompt": [%s]}' % ids,
        b'{"prompt": [%s]}' % (b"[]," * ((BODY - shell) // 3 - 1) + b"[]"),
        b'{"prompt": "And", "user": "%s"}' % (b"x" * (BODY - 64)),
    ]


def _post(port: int, body: bytes) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().read()


if __name__ == "__main__":
    main()
