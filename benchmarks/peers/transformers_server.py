"""transformers behind a lock and a streamer, in OpenAI's protocol, as far as bench_serving.py asks.

    python benchmarks/peers/transformers_server.py FOLDER float32

One request generates at a time; the others wait for the lock, as they came.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


class Tokens:
    """A streamer that hands each token to an event loop."""

    def __init__(self, queue: asyncio.Queue[int | None]) -> None:
        self._queue, self._loop = queue, asyncio.get_running_loop()
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self._say(int(value.item()))
        self._prompt_is_next = False

    def end(self) -> None:
        self._say(None)

    def _say(self, token_id: int | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, token_id)


def make_app(model: Any) -> Starlette:
    turn = asyncio.Lock()

    async def completions(request: Request) -> StreamingResponse:
        asked = await request.json()
        ids = torch.tensor([asked["prompt"]])
        count = asked["max_tokens"]

        async def events() -> AsyncIterator[bytes]:
            async with turn:
                queue: asyncio.Queue[int | None] = asyncio.Queue()
                tokens = Tokens(queue)
                options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False,
                           "pad_token_id": model.config.eos_token_id}  # fmt: skip
                work = asyncio.to_thread(model.generate, ids, streamer=tokens, **options)
                task = asyncio.ensure_future(work)
                while (token_id := await queue.get()) is not None:
                    choice = {"index": 0, "text": str(token_id), "finish_reason": None}
                    yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
                await task
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


class Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"serving at http://{host}:{port}", flush=True)


def main() -> None:
    folder, dtype = sys.argv[1:]
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    app = make_app(model.eval())
    Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")).run()


if __name__ == "__main__":
    main()
