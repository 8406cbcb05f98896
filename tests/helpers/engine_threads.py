"""What engines on threads, their streams and their lock hold inside: tests look at it here only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import fastgen
from fastgen.frontends.async_engine import AsyncEngine, AsyncStream
from fastgen.frontends.engine_thread import EngineThread, RequestHandle
from fastgen.frontends.fair_lock import FairLock
from fastgen.frontends.threaded_engine import ThreadedEngine, ThreadedStream
from held_steps import stepping
from waits import wait_until

AnyEngine = AsyncEngine | ThreadedEngine


def handles_of(engine: AnyEngine) -> set[RequestHandle]:
    """Of the requests that have not ended."""
    return set(engine.thread._handles)


def listeners_of(engine: AnyEngine) -> set[RequestHandle]:
    """Those of the requests for which somebody waits just now, or has not left."""
    if isinstance(engine, AsyncEngine):
        return set(engine._waiters)
    return {*engine._futures, *engine._streams}


def is_alive(engine: AnyEngine) -> bool:
    """Whether its thread is."""
    return engine.thread._thread.is_alive()


def has_stopped(thread: EngineThread) -> bool:
    """Whether it has been told to end, or has given up."""
    return thread._stopped


def handle_of(stream: AsyncStream | ThreadedStream) -> RequestHandle:
    """Of a stream that has begun."""
    assert stream._handle is not None
    return stream._handle


def num_unread(stream: AsyncStream) -> int:
    """Tokens of its only row that wait for the reader."""
    handle = stream._handle
    if handle is None or handle.request is None or handle.reader is None:
        return 0
    [row] = handle.request.rows
    return handle.reader.num_unread(row)


def num_waiting(lock: FairLock) -> int:
    return len(lock._waiting)


def is_free(lock: FairLock) -> bool:
    return not lock._waiting and not lock._taken


@contextmanager
def held_until_cancelled(model: fastgen.Generator, engine: AnyEngine) -> Iterator[None]:
    """No step ends before all requests that the engine has by then have been cancelled."""
    cancel, cancelled = engine.thread.cancel, set[RequestHandle]()

    def cancel_and_note(handle: RequestHandle) -> None:
        cancel(handle)
        cancelled.add(handle)

    def hold() -> None:
        wait_until(lambda: handles_of(engine) <= cancelled)

    with pytest.MonkeyPatch.context() as patch, stepping(model, hold):
        patch.setattr(engine.thread, "cancel", cancel_and_note)
        yield


class Clock:
    """Time, as an engine's thread is told it; it stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now
