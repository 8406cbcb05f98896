"""AsyncEngine: a model in an asyncio program, without ever blocking its event loop.

The engine runs on a thread of its own. Texts that take long are encoded and decoded on others.
Once a step, one call wakes all tasks that the step has something for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from fastgen.engine.requests import Request
from fastgen.frontends.engine_thread import QueueConfig, RequestHandle, estimate_size
from fastgen.frontends.facade import EngineFacade, SubmitOptions, requests_of
from fastgen.frontends.generator import Generator
from fastgen.frontends.jobs import Job
from fastgen.frontends.prompts import Params, Prompt, as_list
from fastgen.results import Generation, Piece, Score
from fastgen.sampling.params import SamplingParams

T = TypeVar("T")
_LISTS = (
    *("bad_words", "allowed_token_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("logit_bias", "sequence_bias", "stop", "stop_token_ids"),
)
_QUICK_SIZE = 2048  # characters or ids that an event loop may encode itself: well below 1 ms


class AsyncEngine(EngineFacade):
    """One model for many tasks of one event loop. Use it in an `async with` block.

    Args:
        model: stays the caller's: closing the engine does not close it.
        queue_config: how much may wait, and for how long.

    A task that is cancelled, and a stream that is closed, end their requests before the next step.
    """

    def __init__(self, model: Generator, queue_config: QueueConfig | None = None) -> None:
        super().__init__(model, queue_config)
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(2, "fastgen-texts")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: dict[RequestHandle, asyncio.Future[None]] = {}

    async def generate(
        self,
        prompts: Any,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continue one prompt or many, as Generator.generate does.

        Args:
            cache_salt: prompts with different salts share no KV blocks.

        Raises:
            TypeError, ValueError: a prompt or option is wrong; nothing has been generated then.
            QueueFull: too many are waiting.
            StepFailedError: a step failed.
            EngineClosedError, EngineDeadError: the engine takes no requests.
        """
        size = estimate_size(many := as_list(prompts)) + len(many) * _values_in(params, options)
        jobs = await self._off_loop(size, lambda: list(self._make.jobs(prompts, params, options)))
        requests = await self._run(jobs, SubmitOptions(timeout, priority, cache_salt))
        size = sum(len(row.new_token_ids) for request in requests for row in request.rows)
        return await self._off_loop(size, lambda: [self._make.generation(r) for r in requests])

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        **options: Any,
    ) -> AsyncStream:
        """Continue one prompt, piece by piece: `async for piece in engine.stream(...)`.

        It begins when its first piece is asked for, or with `await stream.open()`; either raises
        what `generate` would raise.
        """

        async def begin() -> RequestHandle:
            size = estimate_size([prompt]) + _values_in(params, options)
            job = await self._off_loop(size, lambda: self._make.streamed(prompt, params, options))
            queued = SubmitOptions(timeout, priority, cache_salt)
            [handle] = self._submit([job], self._notify(), queued, streams=True)
            return handle

        return AsyncStream(self, begin)

    async def score(
        self,
        texts: Any,
        *,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[Score]:
        """Log-probability of each token of each text, as Generator.score does.

        Raises:
            TypeError, ValueError: a text is wrong.
            QueueFull: too many are waiting.
            EngineError: a text could not be scored to its end; the subclass says why.
        """
        size = estimate_size(as_list(texts))
        scoring = await self._off_loop(size, lambda: self._make.scoring(texts))
        requests = await self._run(scoring.jobs, SubmitOptions(timeout, priority, cache_salt))
        return await self._off_loop(size, lambda: scoring.scores(requests))

    async def tokenize(
        self, texts: list[str], *, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of each text, as of a prompt; or with the special tokens that transformers'
        tokenizer adds by default.

        Raises:
            ValueError: the model has no tokenizer, or a text is not valid Unicode.
        """

        def encoded() -> list[list[int]]:
            return self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)

        return await self._off_loop(estimate_size(texts), encoded)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of ids, without special tokens, or with them written out."""

        def decoded() -> str:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await self._off_loop(len(token_ids), decoded)

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all have ended by then."""
        self.thread.refuse("is shutting down")
        return await asyncio.get_running_loop().run_in_executor(None, self.thread.drain, timeout)

    async def close(self) -> None:
        """End all requests with "cancelled". Safe to call twice."""
        if self.thread.origin.in_child:
            return
        await asyncio.get_running_loop().run_in_executor(None, self.thread.stop)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def wait_for_pending(self, handle: RequestHandle) -> None:
        """Wait until there is something new for it, or it has ended."""
        self.thread.origin.refuse_in_child()
        handle.acknowledge()
        if handle.has_pending:
            return
        assert self._loop is not None
        self._waiters[handle] = waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            del self._waiters[handle]

    async def _run(self, jobs: Sequence[Job], options: SubmitOptions) -> list[Request]:
        handles = self._submit(jobs, self._notify(), options)
        try:
            for handle in handles:
                while not handle.done:
                    await self.wait_for_pending(handle)
                handle.raise_failure()
        except BaseException:
            for handle in handles:
                self.thread.cancel(handle)
            raise
        return requests_of(handles)

    async def _off_loop(self, size: int, work: Callable[[], T]) -> T:
        """Do short work at once, long work on another thread."""
        self.thread.origin.refuse_in_child()
        if size <= _QUICK_SIZE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _notify(self) -> Callable[[list[RequestHandle]], None]:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("an AsyncEngine belongs to the event loop that used it first")
        return self._wake_soon

    def _wake_soon(self, handles: list[RequestHandle]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._wake, handles)

    def _wake(self, handles: list[RequestHandle]) -> None:
        for handle in handles:
            waiter = self._waiters.get(handle)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)


class AsyncStream:
    """An asynchronous iterator over the Pieces of one request.

    Closing it (`aclose`, or `async with`), cancelling the task that reads it, or dropping it ends
    the generation. A reader that leaves too many tokens unread is cut off with a SlowReaderError.
    """

    def __init__(self, engine: AsyncEngine, begin: Callable[[], Any]) -> None:
        self._engine, self._begin = engine, begin
        self._handle: RequestHandle | None = None
        self._opening = asyncio.Lock()
        self._is_closed = False
        self._is_read = False  # by some task, just now

    async def open(self) -> None:
        """Put the request into the engine, if it is not there yet."""
        async with self._opening:
            if self._handle is None and not self._is_closed:
                self._handle = await self._begin()
            if self._is_closed:  # perhaps meanwhile
                self._close()

    @property
    def request(self) -> Request | None:
        return None if self._handle is None else self._handle.request

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece.

        Raises:
            StepFailedError: a step failed.
            SlowReaderError: too much was left unread.
            RuntimeError: another task waits for it.
        """
        if self._is_read:
            raise RuntimeError("a stream is read by one task at a time")
        self._is_read = True
        try:
            return await self._next()
        except StopAsyncIteration:
            raise
        except BaseException:
            self._close()
            raise
        finally:
            self._is_read = False

    async def _next(self) -> Piece:
        await self.open()
        handle = self._handle
        if handle is None:  # it was closed before it began
            raise StopAsyncIteration
        assert handle.reader is not None
        while (piece := handle.piece()) is None:
            if handle.reader.ended:
                raise StopAsyncIteration
            await self._engine.wait_for_pending(handle)
        return piece

    async def aclose(self) -> None:
        """End the generation; its seat and blocks are free at the next step."""
        self._close()

    def _close(self) -> None:
        self._is_closed = True
        if self._handle is not None:
            self._handle.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()


def _values_in(params: Params, options: dict[str, Any]) -> int:
    """How much has to be checked for each prompt: words and ids that options hold."""
    one = params if isinstance(params, SamplingParams) or not params else params[0]
    values = (options.get(name, getattr(one, name, None)) for name in _LISTS)
    return sum(
        estimate_size(value) for value in values if isinstance(value, (str, list, tuple, dict))
    )
