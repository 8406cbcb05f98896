"""An engine on a thread of its own, for servers: a bounded queue, notifications, health.

AsyncEngine and ThreadedEngine are its two faces. Results are read from the rows of a request, as
everywhere; this module only notifies their owners, once a step, that there is something new.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fastgen.checks import integer, real
from fastgen.engine.forks import Origin
from fastgen.engine.requests import Request, Row
from fastgen.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    OptionError,
    QueueFull,
    SlowReaderError,
    message_of,
)
from fastgen.frontends.fair_lock import FairLock
from fastgen.frontends.generator import Generator
from fastgen.frontends.jobs import Job
from fastgen.frontends.stream import PieceReader, raise_error
from fastgen.results import Piece

logger = logging.getLogger("fastgen")
_LONG = 4096  # characters and ids; more than any event loop encodes or checks itself
_FAILURES = 3  # steps that fail one after another, and no other between: the decoder is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """How much of an engine callers may take; the same for all models of a server.

    Attributes:
        max_waiting: rows that may wait for a seat; what exceeds that is refused with QueueFull.
        max_unread: tokens of a streamed row that may wait for its reader; more cancel the request.
        stall_timeout: seconds without a step, with work to do, after which an engine is not ready.
        fair_lock: of models that share a processor.
    """

    max_waiting: int = 1024
    max_unread: int = 512
    stall_timeout: float = 10.0
    fair_lock: FairLock | None = None

    def __post_init__(self) -> None:
        integer("max_waiting", self.max_waiting, 0)
        integer("max_unread", self.max_unread, 1)
        real("stall_timeout", self.stall_timeout, 0, float("inf"), above=True)


class RequestHandle:
    """A request under way, for the task or thread that waits for it. It is the request's Listener.

    Attributes:
        request: None until it has been put into the engine.
        reader: of a streamed request.
        stalled: it has been cancelled because its reader did not read.
    """

    def __init__(self, thread: EngineThread, notify: Notify, *, streams: bool) -> None:
        self.request: Request | None = None
        self.reader: PieceReader | None = None
        self.stalled = False
        self.failure: EngineError | None = None  # the engine's, not the request's
        self.notify = notify
        self._thread, self._streams = thread, streams
        self._is_pending = False  # it waits to be notified of, or its owner has not acknowledged
        self._steps: dict[int, int] = {}  # of each row, the last in which it got a token

    @property
    def done(self) -> bool:
        return self.failure is not None or (self.request is not None and self.request.done)

    @property
    def has_pending(self) -> bool:
        return self.done or (self.reader is not None and self.reader.has_pending())

    def acknowledge(self) -> None:
        """Its owner reads what it has now; the next token notifies it again."""
        self._is_pending = False

    def raise_failure(self) -> None:
        """Raise EngineError if the request ended for a reason that is not its own."""
        if self.failure is not None:
            raise self.failure
        if self.stalled:
            most = self._thread.queue_config.max_unread
            told = f"cancelled: more than {most} tokens of a row waited to be read"
            raise SlowReaderError(told)
        if self.request is not None:
            raise_error(self.request)

    def piece(self) -> Piece | None:
        """The next one of a streamed request; None if there is nothing new.

        Raises:
            StepFailedError: a step failed.
            SlowReaderError: too much was left unread.
        """
        if self.stalled or self.failure is not None:
            self.raise_failure()
        assert self.reader is not None
        return self.reader.piece()

    def close(self) -> None:
        """End it before the next step, and hand out nothing more."""
        self._thread.cancel(self)
        if self.reader is not None:
            self.reader.end()

    def row_drew(self, row: Row) -> None:
        if not self._streams:
            return
        # The first token of a step alone: nobody can read between that and the next.
        if self.reader is not None and row.finish_reason is None and self._is_new_step(row):
            self._cut_off(self.reader.num_unread(row))
        self._announce()

    def _is_new_step(self, row: Row) -> bool:
        last, self._steps[row.index] = self._steps.get(row.index, 0), row.num_steps
        return row.num_steps != last

    def _cut_off(self, num_unread: int) -> None:
        if num_unread > self._thread.queue_config.max_unread and not self.stalled:
            self.stalled = True
            self._thread.cancel(self)

    def request_ended(self, request: Request) -> None:
        self._thread.ended(self, request)
        self._announce()

    def fail(self, error: EngineError) -> None:
        self.failure = error
        self._announce()

    def _announce(self) -> None:
        if not self._is_pending:
            self._is_pending = True
            self._thread.pending.append(self)


Notify = Callable[[list[RequestHandle]], None]


class EngineThread:
    """Drives a model's engine while there is work. Thread-safe. It does not own the model."""

    def __init__(self, model: Generator, queue_config: QueueConfig) -> None:
        self.model, self.queue_config = model, queue_config
        self.pending: deque[RequestHandle] = deque()
        self.failure: str | None = None  # why the engine cannot go on
        # Called with each request that has ended, on the step's thread: it must be quick.
        self.observe: Callable[[Request], None] = lambda request: None
        self._engine = model.engine
        self.origin = Origin()  # of the thread
        self._handles: set[RequestHandle] = set()  # those that have not ended
        self._changed = threading.Condition()  # guards what follows, and its waiters
        self._refusal: str | None = None
        self._stopped = False
        self._failures = 0  # in a row
        self._last_error: BaseException | None = None
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="fastgen-steps", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken and, if there are any, steps make progress."""
        if self.origin.in_child:
            return False
        takes = self._refusal is None and self.failure is None and not self._engine.closed
        return takes and not self.stalled

    @property
    def stalled(self) -> bool:
        """Whether no step has ended for long, though requests are under way."""
        waited = time.monotonic() - self._progress
        return bool(self._handles) and waited > self.queue_config.stall_timeout

    def submit(
        self,
        jobs: Sequence[Job],
        notify: Notify,
        *,
        streams: bool = False,
        deadline: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[RequestHandle]:
        """Put all jobs into the engine, or none.

        Args:
            notify: is called on the step's thread with its handles that have something new.
            streams: notify of each token, not only of the end.

        Raises:
            QueueFull: they would be too many.
            EngineClosedError, EngineDeadError: no requests are taken any more.
            TypeError, ValueError: deadline, priority or cache_salt is wrong.
        """
        self.origin.refuse_in_child()
        handles: list[RequestHandle] = []
        with self._changed:
            self._refuse(sum(job.params.num_rows for job in jobs))
            if not self._handles:
                self._progress = time.monotonic()  # the work begins now
            try:
                for job in jobs:
                    handle = RequestHandle(self, notify, streams=streams)
                    handles.append(handle)
                    self._handles.add(handle)
                    handle.request = self._engine.add_request(
                        job.token_ids, job.params, sinks=job.sinks, deadline=deadline,
                        priority=priority, cache_salt=cache_salt, listener=handle,
                        is_checked=True,
                    )  # fmt: skip
                    handle.reader = PieceReader(handle.request) if streams else None
            except BaseException:
                for handle in handles:
                    self._handles.discard(handle)
                    if handle.request is not None:
                        self._engine.cancel(handle.request)  # now: the thread may be asleep
                raise
            self._changed.notify_all()
        self._notify_owners()  # what has nothing to compute has ended already
        return handles

    def cancel(self, handle: RequestHandle) -> None:
        """Have a request ended before the next step, without waiting for it."""
        if self.origin.in_child:
            return  # it has ended
        if handle.request is not None and not handle.request.done:
            self._engine.cancel(handle.request, if_idle=False)

    def ended(self, handle: RequestHandle, request: Request) -> None:
        """A request has ended; its handle calls this."""
        self._handles.discard(handle)
        self._last_error = request.error or self._last_error
        self.observe(request)

    def refuse(self, why: str) -> None:
        """Take no more requests; those under way go on."""
        if self.origin.in_child:
            return  # it takes none
        with self._changed:
            self._refusal = self._refusal or why

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; whether all have ended by then."""
        self.refuse("is shutting down")
        if self.origin.in_child:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._handles, timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """Cancel all requests, and end the thread. Safe to call twice.

        A step that does not end is waited for no longer than `timeout` seconds.
        """
        if self.origin.in_child:
            return
        self.refuse("has been closed")
        for handle in list(self._handles):
            self.cancel(handle)
        end = time.monotonic() + timeout
        with self._changed:
            self._changed.wait_for(lambda: not self._handles, timeout)
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.1, end - time.monotonic()))
        self._fail_all(EngineClosedError("this engine has been closed"))

    def _refuse(self, num_rows: int) -> None:
        if self.failure is not None:
            raise EngineDeadError(f"this engine cannot go on: {self.failure}")
        if self._refusal is not None:
            raise EngineClosedError(f"this engine {self._refusal}")
        self.check_size(num_rows)
        if self._engine.num_unfinished + num_rows > self._room:
            raise QueueFull(
                f"{num_rows} more would exceed the {self._room} completions that may run and wait"
            )

    @property
    def _room(self) -> int:
        return self._engine.decoder.limits.num_seats + self.queue_config.max_waiting

    def check_size(self, num_rows: int) -> None:
        """Raise OptionError for more rows in one request than may ever run and wait."""
        if num_rows > self._room:
            raise OptionError(
                f"{num_rows} completions exceed the {self._room} that may run and wait"
            )

    def _work(self) -> None:
        while self._awaits_work():
            self._step()
            self._notify_owners()
            with self._changed:
                self._changed.notify_all()

    def _awaits_work(self) -> bool:
        """Wait for a request; False when the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._handles or self._stopped)
            return not self._stopped

    def _step(self) -> None:
        """One step of the engine, whoever runs it."""
        engine, stats = self._engine, self._engine.stats
        steps, failed = stats.steps, stats.failed_steps

        def moved_on() -> bool:
            return (stats.steps, stats.failed_steps) != (steps, failed) or not engine.num_unfinished

        failure: BaseException | None = None
        try:
            if self.queue_config.fair_lock is None:
                engine.run(moved_on)
            else:
                with self.queue_config.fair_lock:
                    engine.run(moved_on)
        except BaseException as error:
            failure = error
            logger.exception("an engine step failed; no request caused it")
        self._progress = time.monotonic()
        if stats.steps != steps:
            self._failures = 0
        elif failure is not None or stats.failed_steps != failed:
            self._failures += 1
            if self._failures == _FAILURES:
                self._break(failure or self._last_error)

    def _break(self, error: BaseException | None) -> None:
        """The decoder cannot go on: say so, and end everything."""
        with self._changed:  # a caller of `submit` has put in all, or finds this
            self.failure = "no reason was given" if error is None else message_of(error)
        logger.critical("%d steps failed in a row; the engine cannot go on: %s",
                        _FAILURES, self.failure, exc_info=error)  # fmt: skip
        self._fail_all(EngineDeadError(f"this engine cannot go on: {self.failure}"))
        self._stopped = True

    def _fail_all(self, error: EngineError) -> None:
        for handle in list(self._handles):
            try:
                if handle.request is not None:
                    self._engine.cancel(handle.request)
            except Exception:
                logger.exception("a request could not be ended")
            handle.fail(error)
        self._handles.clear()
        self._notify_owners()

    def _notify_owners(self) -> None:
        """Tell the owner of each pending handle, all handles of one owner in one call."""
        pending: dict[Notify, list[RequestHandle]] = {}
        while self.pending:
            try:
                handle = self.pending.popleft()
            except IndexError:  # another thread was faster
                break
            pending.setdefault(handle.notify, []).append(handle)
        for notify, handles in pending.items():
            try:
                notify(handles)
            except RuntimeError:  # its event loop, or its pool, has been closed
                for handle in handles:
                    self.cancel(handle)


def estimate_size(items: Iterable[object]) -> int:
    """Characters and ids of the items, plus 1 for each: an estimate of how long they take.

    Counted until it is certain that they take long, since an event loop waits for it.
    """
    size = 0
    for item in items:
        size += 1 + len(item) if isinstance(item, (str, list, tuple)) else 1
        if size > _LONG:
            break
    return size
