"""A peer as a server: OpenAI's protocol as far as bench_serving.py asks for it, ids in and ids out.

    python benchmarks/peers/token_server.py '{"peer": "transformers", "folder": ..., ...}'  # a Job

The peer is a module like those of worker.py with one function more: `serve(job)` gives what
generates for one request. SERVES_TOGETHER says that many threads may call it at once; else one
request waits for another at a lock.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from worker import convert, find_peer, parse_job

# Prompt, new tokens, and what takes each token as it comes.
Generate = Callable[[list[int], int, Callable[[int], None]], None]


def make_app(generate: Generate, *, together: bool) -> Starlette:
    turn, pool = asyncio.Lock(), ThreadPoolExecutor(64 if together else 1)

    async def completions(request: Request) -> StreamingResponse:
        asked = await request.json()

        async def events() -> AsyncIterator[bytes]:
            loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()

            def emit(token_id: int) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, token_id)

            async with AsyncExitStack() as stack:
                if not together:
                    await stack.enter_async_context(turn)
                count = asked["max_tokens"]
                work = loop.run_in_executor(pool, generate, asked["prompt"], count, emit)
                for _ in range(count):
                    choice = {"index": 0, "text": "", "token_ids": [await queue.get()]}
                    yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
                await work
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


class Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"serving at http://{host}:{port}", flush=True)


def main() -> None:
    job = parse_job(sys.argv[1])
    peer = find_peer(job)
    convert(peer, job)
    app = make_app(peer.serve(job), together=peer.SERVES_TOGETHER)
    Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")).run()


if __name__ == "__main__":
    main()
