"""Responses that a client may leave: server-sent events, and work that ends with its client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from fastgen.frontends.async_engine import AsyncStream
from fastgen.results import Piece
from fastgen.server.errors import api_error

T = TypeVar("T")
logger = logging.getLogger("fastgen.server")
DONE = b"data: [DONE]\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """
    task: asyncio.Task[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _end(task, gone)


class EventStream:
    """A response of server-sent events, each an object as JSON; the last is [DONE].

    An exception of `events` becomes an event with an error. When the client goes, they are closed.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            await _end(writing, gone)

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                async for event in events:
                    await send(_body(_data(event)))
                    await asyncio.sleep(0)  # let others run: there may be many events at once
            except Exception as error:
                told = api_error(error)
                if told.status == 500:
                    logger.error("a stream failed", exc_info=error)
                await send(_body(_data(told.body)))
        await send(_body(DONE, more=False))


async def merged(streams: Sequence[AsyncStream]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several streams as they come, each with the index of its stream."""
    if len(streams) == 1:
        async for piece in streams[0]:
            yield 0, piece
        return
    waiting = {_next(stream): at for at, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at = waiting.pop(task)
                with suppress(StopAsyncIteration):
                    piece = task.result()
                    waiting[_next(streams[at])] = at
                    yield at, piece
    finally:
        await _end(*waiting)


def _next(stream: AsyncStream) -> asyncio.Task[Piece]:
    return asyncio.ensure_future(stream.__anext__())


async def _gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def as_json(value: dict[str, Any]) -> bytes:
    """What a response holds.

    Raises:
        RuntimeError: it holds a number that JSON has not; that is not its reader's fault.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise RuntimeError("a response cannot be written as JSON") from error
    return text.encode("utf-8", "replace")


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + as_json(event) + b"\n\n"


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
