"""ThreadedEngine: a model in a program of threads; `submit` gives a concurrent.futures.Future."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from fastgen.engine.forks import NO_THREAD
from fastgen.engine.inbox import deadline_in
from fastgen.errors import EngineError
from fastgen.frontends.engine_thread import EngineThread, QueueConfig, RequestHandle
from fastgen.frontends.generator import Generator
from fastgen.frontends.jobs import Job
from fastgen.frontends.prompts import Prompt, is_one, to_list
from fastgen.results import Generation, Piece, Score
from fastgen.sampling.params import SamplingParams

_POLL = 0.1  # seconds: a word that came before anybody listened is not said again

_returned: weakref.WeakSet[Future[Any]] = weakref.WeakSet()  # all that somebody still has


def _fail_in_child() -> None:
    """Nobody settles in a forked child what its parent waits for."""
    for future in list(_returned):
        future._condition = threading.Condition()  # the old one may be taken
        if not future.done():
            future.set_exception(EngineError(NO_THREAD))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fail_in_child)


class ThreadedEngine:
    """One model for many threads. Use it in a `with` block; it does not close the model.

    Prompts are encoded on the thread that brings them, results decoded on a thread of the engine's.
    """

    def __init__(self, model: Generator, queue_config: QueueConfig | None = None) -> None:
        self.thread = EngineThread(model, queue_config or QueueConfig())
        self._make = model.job_maker
        self._pool = ThreadPoolExecutor(1, "fastgen-results")
        self._futures: dict[RequestHandle, Future[Any]] = {}
        self._streams: dict[RequestHandle, threading.Event] = {}

    @property
    def ready(self) -> bool:
        """Whether requests are taken and, if there are any, steps make progress."""
        return self.thread.ready

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **options: Any,
    ) -> Future[Generation]:
        """Continue one prompt. Cancelling the Future ends the request.

        Raises:
            TypeError, ValueError: the prompt or an option is wrong.
            QueueFull: too many are waiting.
            EngineError: the engine takes no requests. One that fails later is the Future's.
        """
        if not is_one(prompt) and to_list(prompt):
            raise TypeError("submit takes one prompt: call it for each")
        [job] = self._make.jobs([prompt], params, options)
        handle = self._put(job, timeout, priority, cache_salt, streams=False)
        future: Future[Generation] = Future()
        self._futures[handle] = future
        _returned.add(future)

        def ended(future: Future[Generation]) -> None:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # else nobody who waits for several is told
                self._futures.pop(handle, None)
                self.thread.cancel(handle)

        future.add_done_callback(ended)
        if handle.done:
            self._notify([handle])
        return future

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **options: Any,
    ) -> ThreadedStream:
        """Continue one prompt, piece by piece; it is generated whether it is read or not."""
        job = self._make.streamed(prompt, params, options)
        handle = self._put(job, timeout, priority, cache_salt, streams=True)
        self._streams[handle] = updated = threading.Event()
        return ThreadedStream(self, handle, updated)

    def score(
        self,
        texts: Any,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """Log-probability of each token of each text, as Generator.score does; it is waited for.

        Raises:
            TypeError, ValueError: a text is wrong.
            QueueFull: too many are waiting.
            EngineError: a text could not be scored to its end.
        """
        scoring, updated = self._make.scoring(texts), threading.Event()
        handles = self.thread.submit(
            scoring.jobs, self._notify, deadline=deadline_in(timeout), priority=priority,
            cache_salt=cache_salt,
        )  # fmt: skip
        self._streams.update(dict.fromkeys(handles, updated))
        try:
            for handle in handles:
                while not handle.done:
                    updated.wait(_POLL)
                    updated.clear()
                handle.raise_failure()
        finally:
            for handle in handles:
                self.thread.cancel(handle)
                self.forget(handle)
        return scoring.scores([handle.request for handle in handles if handle.request is not None])

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all have ended by then."""
        return self.thread.drain(timeout)

    def close(self) -> None:
        """End all requests with "cancelled". Safe to call twice."""
        if self.thread.origin.is_parent:
            return
        self.thread.stop()
        self._pool.shutdown(wait=False)  # it may be the one that calls this

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def forget(self, handle: RequestHandle) -> None:
        """Its stream has ended."""
        self._streams.pop(handle, None)

    def _put(
        self,
        job: Job,
        timeout: float | None,
        priority: int,
        cache_salt: str | None,
        *,
        streams: bool,
    ) -> RequestHandle:
        [handle] = self.thread.submit(
            [job], self._notify, streams=streams, deadline=deadline_in(timeout),
            priority=priority, cache_salt=cache_salt,
        )  # fmt: skip
        return handle

    def _notify(self, handles: Sequence[RequestHandle]) -> None:
        for handle in handles:
            if (updated := self._streams.get(handle)) is not None:
                updated.set()
            elif handle.done and (future := self._futures.pop(handle, None)) is not None:
                self._pool.submit(self._settle, handle, future)

    def _settle(self, handle: RequestHandle, future: Future[Generation]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            handle.raise_failure()
            assert handle.request is not None
            future.set_result(self._make.generation(handle.request))
        except BaseException as error:
            future.set_exception(error)


class ThreadedStream:
    """An iterator over the Pieces of one request, for one thread; see fastgen.Stream."""

    def __init__(
        self, engine: ThreadedEngine, handle: RequestHandle, updated: threading.Event
    ) -> None:
        self._engine, self._handle, self._updated = engine, handle, updated

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            EngineError: a step failed, or too much was left unread.
        """
        reader = self._handle.reader
        assert reader is not None
        try:
            while True:
                self._engine.thread.origin.refuse_in_child()
                self._updated.clear()
                self._handle.acknowledge()
                if (piece := self._handle.piece()) is not None:
                    return piece
                if reader.ended:
                    self._engine.forget(self._handle)
                    raise StopIteration
                self._updated.wait()
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the generation; rows that had not ended end with "cancelled"."""
        self._handle.close()
        self._engine.forget(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
