"""ThreadedEngine: a model in a program of threads; `submit` gives a concurrent.futures.Future."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from fastgen.engine_thread import EngineThread, Terms, Ticket
from fastgen.generator import Generator
from fastgen.inbox import deadline_in
from fastgen.jobs import Job
from fastgen.prompts import Prompt, is_one, listed
from fastgen.results import Generation, Piece, Score
from fastgen.sampling_params import SamplingParams

_POLL = 0.1  # seconds: a word that came before anybody listened is not said again


class ThreadedEngine:
    """One model for many threads. Use it in a `with` block; it does not close the model.

    Prompts are encoded on the thread that brings them, results decoded on a thread of the engine's.
    """

    def __init__(self, model: Generator, terms: Terms | None = None) -> None:
        self.thread = EngineThread(model, terms or Terms())
        self._make = model.job_maker
        self._pool = ThreadPoolExecutor(1, "fastgen-results")
        self._futures: dict[Ticket, Future[Any]] = {}
        self._streams: dict[Ticket, threading.Event] = {}

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
        if not is_one(prompt) and listed(prompt):
            raise TypeError("submit takes one prompt: call it for each")
        [job] = self._make.jobs([prompt], params, options)
        ticket = self._put(job, timeout, priority, cache_salt, streams=False)
        future: Future[Generation] = Future()
        self._futures[ticket] = future

        def ended(future: Future[Generation]) -> None:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # else nobody who waits for several is told
                self._futures.pop(ticket, None)
                self.thread.cancel(ticket)

        future.add_done_callback(ended)
        if ticket.done:
            self._tell([ticket])
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
        ticket = self._put(job, timeout, priority, cache_salt, streams=True)
        self._streams[ticket] = news = threading.Event()
        return ThreadedStream(self, ticket, news)

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
        scoring, news = self._make.scoring(texts), threading.Event()
        tickets = self.thread.submit(
            scoring.jobs, self._tell, deadline=deadline_in(timeout), priority=priority,
            cache_salt=cache_salt,
        )  # fmt: skip
        self._streams.update(dict.fromkeys(tickets, news))
        try:
            for ticket in tickets:
                while not ticket.done:
                    news.wait(_POLL)
                    news.clear()
                ticket.raise_failure()
        finally:
            for ticket in tickets:
                self.thread.cancel(ticket)
                self.forget(ticket)
        return scoring.scores([ticket.request for ticket in tickets if ticket.request is not None])

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all have ended by then."""
        return self.thread.drain(timeout)

    def close(self) -> None:
        """End all requests with "cancelled". Safe to call twice."""
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

    def forget(self, ticket: Ticket) -> None:
        """Its stream has ended."""
        self._streams.pop(ticket, None)

    def _put(
        self,
        job: Job,
        timeout: float | None,
        priority: int,
        cache_salt: str | None,
        *,
        streams: bool,
    ) -> Ticket:
        [ticket] = self.thread.submit(
            [job], self._tell, streams=streams, deadline=deadline_in(timeout),
            priority=priority, cache_salt=cache_salt,
        )  # fmt: skip
        return ticket

    def _tell(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if (news := self._streams.get(ticket)) is not None:
                news.set()
            elif ticket.done and (future := self._futures.pop(ticket, None)) is not None:
                self._pool.submit(self._settle, ticket, future)

    def _settle(self, ticket: Ticket, future: Future[Generation]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            ticket.raise_failure()
            assert ticket.request is not None
            future.set_result(self._make.generation(ticket.request))
        except BaseException as error:
            future.set_exception(error)


class ThreadedStream:
    """An iterator over the Pieces of one request, for one thread; see fastgen.Stream."""

    def __init__(self, engine: ThreadedEngine, ticket: Ticket, news: threading.Event) -> None:
        self._engine, self._ticket, self._news = engine, ticket, news

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            EngineError: a step failed, or too much was left unread.
        """
        reader = self._ticket.reader
        assert reader is not None
        try:
            while True:
                self._news.clear()
                self._ticket.look()
                if (piece := self._ticket.piece()) is not None:
                    return piece
                if reader.ended:
                    self._engine.forget(self._ticket)
                    raise StopIteration
                self._news.wait()
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the generation; rows that had not ended end with "cancelled"."""
        self._ticket.close()
        self._engine.forget(self._ticket)

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
