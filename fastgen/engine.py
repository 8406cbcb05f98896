"""The engine: ids in, ids out. One step loop: schedule, forward, sample, emit.

Any thread may add requests and run the loop. Whoever finds it idle drives it, for everybody, until
what it waits for has come; the others wait for the driver's steps and take over when it leaves. So
a caller that pauses its stream stalls nobody. The engine knows no text: a request that needs text
brings a TextSink for each row.
"""

from __future__ import annotations

import heapq
import numbers
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastgen.decoders.interface import Decoder, Draw
from fastgen.errors import EngineError
from fastgen.processors import Floats
from fastgen.request import Request, Row
from fastgen.results import FinishReason
from fastgen.sampler import token_logprobs
from fastgen.sampling_params import SamplingParams
from fastgen.scheduler import Entry, Scheduler, StepPlan
from fastgen.text_sink import TextSink


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    prefill_tokens: int = 0  # prompt tokens computed
    reused_tokens: int = 0  # prompt tokens found in the KV cache instead
    decode_tokens: int = 0  # drawn tokens fed back
    largest_step: int = 0  # tokens


class Engine:
    """Runs requests on one decoder. Thread-safe."""

    def __init__(self, decoder: Decoder, vocab_size: int, eos_ids: Iterable[int] = ()) -> None:
        self.decoder = decoder
        self.stats = EngineStats()
        self._vocab_size, self._eos_ids = vocab_size, frozenset(eos_ids)
        self._scheduler = Scheduler(decoder.limits)
        self._arrivals: deque[Row] = deque()
        self._cancelled: deque[Request] = deque()
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._progress = threading.Condition()  # guards _driving, _closed, _deadlines
        self._driving = False
        self._closed = False

    @property
    def num_free_blocks(self) -> int:
        return self._scheduler.pool.num_free

    @property
    def num_unfinished(self) -> int:
        """Rows that wait or run."""
        return len(self._arrivals) + self._scheduler.num_unfinished

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        sinks: Sequence[TextSink] | None = None,
        deadline: float | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a prompt; it runs when somebody runs the engine.

        Args:
            token_ids: the prompt, at least one id.
            params: its options.
            sinks: one for each of the n rows, for text and stop strings.
            deadline: the time.monotonic() at which its rows end with "timeout".
            cache_salt: prompts with different salts share no KV blocks.

        Raises:
            TypeError, ValueError: the request can never be right; the engine is untouched.
            EngineError: the engine is closed.
        """
        prompt = self.check_request(token_ids, params)
        if params.stop and sinks is None:
            raise ValueError("stop strings need text: this request has no TextSink")
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(prompt, params, deadline, cache_salt)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        max_len = min(len(prompt) + params.max_new_tokens, self.decoder.limits.max_seq_len)
        stop_ids = frozenset(params.stop_token_ids)
        stop_ids |= frozenset() if params.ignore_eos else self._eos_ids
        request.make_rows(seed, max_len, stop_ids, sinks)
        if request.prefill_len == 0:  # nothing to compute, nothing to draw
            for row in request.rows:
                row.finish("length")
                request.row_ended()
            return request
        with self._progress:
            if self._closed:
                raise EngineError("this model has been closed")
            self._arrivals.extend(request.rows)
            if deadline is not None:
                heapq.heappush(self._deadlines, (deadline, id(request), request))
        return request

    def cancel(self, request: Request) -> None:
        """End those of the request's rows that run with "cancelled", before the next step."""
        self._cancelled.append(request)
        with self._drive(wait=False) as driving:
            if driving:
                self._sweep()

    def run(self, until: Callable[[], bool]) -> None:
        """Take part in running the engine until `until()` is true; it is asked after every step.

        Ctrl-C in the main thread is raised between two steps, so that it breaks nobody's row.

        A step that fails ends its rows with "error" and leaves the cause in `request.error`.

        Raises:
            EngineError: nothing is left to run, and `until()` is not true.
        """
        with _deferred_interrupts() as interrupted:

            def over() -> bool:
                return bool(interrupted) or until()

            while not over():
                with self._drive(wait=True, until=over) as driving:
                    if driving and not over():
                        self._step()
                    if driving and self._cancelled:
                        self._sweep()

    def close(self) -> None:
        """End every row with "cancelled" and free the decoder. Safe to call twice."""
        with self._progress:
            self._closed = True  # the next step of whoever drives ends every row
        with self._drive(wait=True):
            self._sweep()
            self.decoder.close()

    @contextmanager
    def _drive(self, *, wait: bool, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the driver's place, if it is free or becomes free before `until()` is true."""
        with self._progress:
            while self._driving and wait and not until():
                self._progress.wait()
            driving = not self._driving
            self._driving = True
        try:
            yield driving
        finally:
            if driving:
                with self._progress:
                    self._driving = False
                    self._progress.notify_all()

    def _step(self) -> None:
        """One step. What goes wrong in it ends the rows of its batch, and no others."""
        if self._sweep():
            return  # that may be what the driver waits for
        rows: Sequence[Row] = ()
        try:
            rows = self._admit()
            plan = self._scheduler.schedule()
            if plan is not None:
                rows = [entry.row for entry in plan.entries]
                self._run_step(plan)
            else:  # whoever runs the engine waits for something that cannot come
                rows = self._scheduler.waiting
                raise EngineError("there is no row that could run")
        except BaseException as error:
            hurt = list(rows or self._scheduler.running)
            self._fail(hurt, error)
            if not (hurt and isinstance(error, Exception)):
                raise

    def _admit(self) -> list[Row]:
        admitted, copies = self._scheduler.admit()
        for row in admitted:
            self.decoder.bind(row.seat, row.params, row.token_ids)
            if row.request.admitted is None:
                row.request.admitted = time.monotonic()
        if copies:
            self.decoder.copy_blocks(copies)
        self.stats.reused_tokens = self._scheduler.num_reused_tokens
        return admitted

    def _run_step(self, plan: StepPlan) -> None:
        step = self.decoder.step(plan.batch)
        draws = iter(step.wait())
        self._scheduler.advance(plan.entries)
        self._count(plan)
        if any(entry.scores for entry in plan.entries):
            _score(plan.entries, step.logits)
        for entry in plan.entries:
            if entry.draws:
                self._emit(entry.row, next(draws))
            elif not entry.row.is_prefilling:
                self._end_row(entry.row, "length")  # nothing was to be drawn

    def _emit(self, row: Row, draw: Draw) -> None:
        row.accept(draw, self._eos_ids)
        if row.request.first_token is None:
            row.request.first_token = time.monotonic()
        if row.finish_reason is not None:
            self._release(row)

    def _sweep(self) -> bool:
        """End what was cancelled and what has run out of time; whether there was any."""
        while self._arrivals:
            self._scheduler.waiting.append(self._arrivals.popleft())
        ended = False
        if self._closed:
            rows = (*self._scheduler.running, *self._scheduler.waiting)
            self._cancelled.extend(dict.fromkeys(row.request for row in rows))
        while self._cancelled:
            ended |= self._end(self._cancelled.popleft(), "cancelled")
        while self._deadlines:  # finished ones leave when they come to the front
            deadline, _, request = self._deadlines[0]
            if not request.done and deadline > time.monotonic():
                break
            with self._progress:
                _, _, request = heapq.heappop(self._deadlines)
            ended |= self._end(request, "timeout")
        return ended

    def _end(self, request: Request, reason: FinishReason) -> bool:
        """End the rows that have not ended yet; whether there were any."""
        if request.done:
            return False
        for row in request.rows:
            self._end_row(row, reason)
        return True

    def _end_row(self, row: Row, reason: FinishReason) -> None:
        if row.finish_reason is None:
            row.finish(reason)
            self._release(row)

    def _release(self, row: Row) -> None:
        if row.seat >= 0:
            self.decoder.release(row.seat)
        self._scheduler.remove(row)
        row.request.row_ended()

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        for request in dict.fromkeys(row.request for row in rows):
            request.error = error
            self._end(request, "error")

    def _count(self, plan: StepPlan) -> None:
        tokens = len(plan.batch.token_ids)
        decoded = sum(entry.start >= entry.row.prompt_len for entry in plan.entries)
        self.stats.steps += 1
        self.stats.decode_tokens += decoded
        self.stats.prefill_tokens += tokens - decoded
        self.stats.largest_step = max(self.stats.largest_step, tokens)

    def check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Raise TypeError or ValueError for the first that is no id of the vocabulary."""
        for token_id in token_ids:
            if not _is_integer(token_id):
                raise TypeError(f"{name} holds {token_id!r}, which is not an integer token id")
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"{name} holds token id {token_id}, outside the vocabulary of "
                    f"{self._vocab_size}"
                )

    def check_request(self, token_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as ints, if add_request would take it; raises what that would raise."""
        prompt = tuple(token_ids)
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token id")
        self.check_ids("prompt", prompt)
        self.check_ids("stop_token_ids", params.stop_token_ids)
        longest = self.decoder.limits.max_seq_len - (params.max_new_tokens > 0)
        if len(prompt) > longest:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with the context of "
                f"{self.decoder.limits.max_seq_len} at most {longest} can be taken"
            )
        return tuple(map(int, prompt))


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def deadline_in(timeout: Any) -> float | None:
    """The time.monotonic() that is `timeout` seconds away; None for None."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not float(timeout) >= 0:
        raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
    return time.monotonic() + float(timeout)


def _score(entries: Sequence[Entry], logits: Floats) -> None:
    """Give prompts their tokens' log-probabilities; each entry's logits stand one after another."""
    at = 0
    for entry in entries:
        request = entry.row.request
        if not entry.scores or request.prompt_logprobs is None:
            continue
        first = entry.start + 1
        targets = request.prompt_token_ids[first : first + entry.scores]
        num_top = request.params.prompt_logprobs or 0
        request.prompt_logprobs += token_logprobs(logits[at : at + entry.scores], targets, num_top)
        at += entry.scores


@contextmanager
def _deferred_interrupts() -> Iterator[list[int]]:
    """In the main thread, hold Ctrl-C back until the block ends; a second one acts at once.

    The list is no longer empty once it was pressed. Only Python's own handler is replaced; a
    program that has set one of its own keeps it.
    """
    pressed: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
