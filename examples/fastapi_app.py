"""A FastAPI app with the model inside: no second process, and the event loop is never blocked.

pip install 'fastgen[server]' fastapi
uvicorn --app-dir examples fastapi_app:app
curl -N 'http://127.0.0.1:8000/stream?prompt=In+the+beginning'
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

import fastgen


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The model lives as long as the app."""
    with fastgen.load(os.environ.get("MODEL")) as model:
        async with fastgen.AsyncEngine(model, fastgen.QueueConfig(max_waiting=256)) as engine:
            app.state.engine = engine
            yield
            await engine.drain(timeout=10)


app = FastAPI(title="A story teller", lifespan=lifespan)


@app.get("/complete")
async def complete(prompt: str, max_new_tokens: int = 50, temperature: float = 0.8) -> dict:
    """The whole text; it is generated even if the client goes, which FastAPI tells streams only."""
    try:
        [generation] = await app.state.engine.generate(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, timeout=30
        )
    except fastgen.QueueFull as error:
        raise HTTPException(503, str(error), {"retry-after": "1"}) from None
    except (fastgen.OptionError, fastgen.OptionTypeError) as error:  # what the caller asked for
        raise HTTPException(422, str(error)) from None
    completion = generation.completions[0]
    return {"text": completion.text, "finish_reason": completion.finish_reason}


@app.get("/stream")
async def stream(prompt: str, max_new_tokens: int = 200) -> StreamingResponse:
    """Text as it comes. When the client goes, its seat is free at the next step."""
    pieces = app.state.engine.stream(prompt, max_new_tokens=max_new_tokens, temperature=0.8)
    try:
        await pieces.open()  # what is wrong is known before the first byte is sent
    except fastgen.QueueFull as error:
        raise HTTPException(503, str(error), {"retry-after": "1"}) from None
    except (fastgen.OptionError, fastgen.OptionTypeError) as error:
        raise HTTPException(422, str(error)) from None

    async def text() -> AsyncIterator[str]:
        async with pieces:
            async for piece in pieces:
                yield str(piece)

    return StreamingResponse(text(), media_type="text/plain; charset=utf-8")
