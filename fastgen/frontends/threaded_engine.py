"""ThreadedEngine: a model in a program with threads; `submit` gives a concurrent.futures.Future."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastgen.engine.forks import NO_THREAD
from fastgen.errors import ForkedEngineError, OptionTypeError
from fastgen.frontends.closing import Closing
from fastgen.frontends.engine_thread import QueueConfig, RequestHandle
from fastgen.frontends.facade import EngineFacade, SubmitOptions, requests_of
from fastgen.frontends.generator import Generator
from fastgen.frontends.prompts import Prompt, is_one, to_list
from fastgen.frontends.stream import PieceStream
from fastgen.results import Generation, Piece, Score
from fastgen.sampling.params import SamplingParams

_POLL = 0.1  # seconds: a notification that came before anybody waited is not repeated

_returned: weakref.WeakSet[Future[Any]] = weakref.WeakSet()  # all that somebody still has


def _fail_in_child() -> None:
    """Nobody settles in a forked child what its parent waits for."""
    for future in list(_returned):
        future._condition = threading.Condition()  # the old one may be taken
        if not future.done():
            future.set_exception(ForkedEngineError(NO_THREAD))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fail_in_child)


class ThreadedEngine(EngineFacade, Closing):
    """One model for many threads. Use it in a `with` block; it does not close the model.

    Prompts are encoded on the thread that brings them, results decoded on a thread of the engine's.
    """

    def __init__(self, model: Generator, queue_config: QueueConfig | None = None) -> None:
        super().__init__(model, queue_config)
        self._pool = ThreadPoolExecutor(1, "fastgen-results")
        self._futures: dict[RequestHandle, Future[Any]] = {}
        self._streams: dict[RequestHandle, threading.Event] = {}

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
            EngineClosedError, EngineDeadError: the engine takes no requests.

        An EngineError that comes later is the Future's.
        """
        if not is_one(prompt) and to_list(prompt):
            raise OptionTypeError("submit takes one prompt: call it for each", "prompt")
        [job] = self._make.jobs([prompt], params, options)
        queued = SubmitOptions(timeout, priority, cache_salt)
        [handle] = self._submit([job], self._notify, queued)
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
        queued = SubmitOptions(timeout, priority, cache_salt)
        [handle] = self._submit([job], self._notify, queued, streams=True)
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
            EngineError: a text could not be scored to its end; the subclass says why.
        """
        scoring, updated = self._make.scoring(texts), threading.Event()
        options = SubmitOptions(timeout, priority, cache_salt)
        handles = self._submit(scoring.jobs, self._notify, options)
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
        return scoring.scores(requests_of(handles))

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all have ended by then."""
        return self.thread.drain(timeout)

    def close(self) -> None:
        """End all requests with "cancelled". Safe to call twice."""
        if self.thread.origin.in_child:
            return
        self.thread.stop()
        self._pool.shutdown(wait=False)  # it may be the one that calls this

    def forget(self, handle: RequestHandle) -> None:
        """Its stream has ended."""
        self._streams.pop(handle, None)

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


class ThreadedStream(PieceStream):
    """An iterator over the Pieces of one request, for one thread; see fastgen.Stream."""

    def __init__(
        self, engine: ThreadedEngine, handle: RequestHandle, updated: threading.Event
    ) -> None:
        self._engine, self._handle, self._updated = engine, handle, updated

    def _next(self) -> Piece | None:
        reader = self._handle.reader
        assert reader is not None
        while True:
            self._engine.thread.origin.refuse_in_child()
            self._updated.clear()
            self._handle.acknowledge()
            if (piece := self._handle.piece()) is not None:
                return piece
            if reader.ended:
                self._engine.forget(self._handle)
                return None
            self._updated.wait()

    def close(self) -> None:
        """End the generation; rows that had not ended end with "cancelled"."""
        self._handle.close()
        self._engine.forget(self._handle)
