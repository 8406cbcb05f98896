"""The engine: ids in, ids out. One step loop: schedule, forward, sample, emit.

Any thread may add requests and run the loop. Whoever finds it idle drives it, for everybody, until
what it waits for has come; the others wait for the driver's steps and take over when it leaves. So
a caller that pauses its stream stalls nobody. The engine knows no text: a request that needs text
brings a TextSink for each row.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fastgen.decoders.interface import Decoder, PendingStep
from fastgen.engine import forks
from fastgen.engine.drafting import Drafting
from fastgen.engine.hand_out import HandOut
from fastgen.engine.inbox import Inbox
from fastgen.engine.interrupts import deferred_interrupts
from fastgen.engine.outputs import needs_logits, step_outputs
from fastgen.engine.pause import Pause
from fastgen.engine.request_checks import (
    check_ids,
    check_options,
    check_params,
    checked_prompt,
    longest_row,
)
from fastgen.engine.request_limits import RequestLimits
from fastgen.engine.requests import Listener, Request, Row
from fastgen.engine.scheduler import Admission, Scheduler, StepPlan
from fastgen.engine.stats import EngineStats
from fastgen.engine.step_lock import StepLock
from fastgen.errors import EngineClosedError, NothingToRunError
from fastgen.results import FinishReason
from fastgen.sampling.params import SamplingParams
from fastgen.speculation.drafter import Drafter
from fastgen.text.detokenizer import Sink


class Engine:
    """Runs requests on one decoder. Thread-safe.

    `limits` bounds what a request may ask for; it may be replaced at any time. `drafting` has the
    drafters of rows whose request brings none.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocab_size: int,
        eos_ids: Iterable[int] = (),
        limits: RequestLimits | None = None,
    ) -> None:
        self.decoder = decoder
        self.limits = limits or RequestLimits()
        self.stats = EngineStats()
        self._vocab_size, self._eos_ids = vocab_size, frozenset(eos_ids)
        self._scheduler = Scheduler(decoder.limits)
        self.drafting = Drafting(vocab_size)
        self._hand_out = HandOut(
            self._scheduler, self.drafting, self.stats, self._eos_ids, self._end_between_tokens
        )
        self._inbox = Inbox()
        self._under_way: deque[tuple[StepPlan, PendingStep]] = deque()  # at most 2 steps
        self._step_lock = StepLock()
        self._progress = self._step_lock.changed  # guards the inbox
        self._closed = False
        forks.watch(self, self._step_lock)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def num_free_blocks(self) -> int:
        return self._scheduler.pool.num_free

    @property
    def num_waiting(self) -> int:
        """Rows that have no seat yet."""
        return len(self._inbox.arrived) + len(self._scheduler.waiting)

    @property
    def num_unfinished(self) -> int:
        """Rows that wait or run."""
        return len(self._inbox.arrived) + self._scheduler.num_unfinished

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        sinks: Sequence[Sink] | None = None,
        deadline: float | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keeps_logits: bool = False,
        listener: Listener | None = None,
        drafter: Drafter | None = None,
        is_checked: bool = False,
    ) -> Request:
        """Queue a prompt; it runs when somebody runs the engine.

        Args:
            token_ids: the prompt, at least one id.
            params: its options.
            sinks: one for each row (`params.num_rows`), for text and stop strings.
            deadline: the time.monotonic() at which its rows end with "timeout".
            cache_salt: prompts with different salts share no KV blocks.
            priority: -1000 to 1000; rows with a lower one go before those with a higher one that
                came up to 1000 rows earlier, a level.
            keeps_logits: rows get `raw_logits`, what each of their tokens was drawn from.
            listener: called at each of the request's tokens, and at its end.
            drafter: guesses its tokens, instead of the engine's; `params.speculate` allows it.
            is_checked: check_request has returned these ids, for these params.

        Raises:
            TypeError, ValueError: the request can never be right, or exceeds `limits`; the engine
                is untouched.
            EngineClosedError: the engine is closed.
        """
        self._step_lock.refuse_if_lost()
        prompt = tuple(token_ids) if is_checked else self.check_request(token_ids, params)
        check_options(params, sinks, deadline, cache_salt, priority)
        request = Request(prompt, params, deadline, cache_salt, priority, listener, drafter)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        seed = secrets.randbits(64) if params.seed is None else params.seed
        max_len = longest_row(len(prompt), params, self.decoder.limits)
        stop_ids, known = params.ending_ids(self._eos_ids), self.decoder.known_options
        request.make_rows(seed, max_len, stop_ids, sinks, known)
        for row in request.rows if keeps_logits else ():
            row.raw_logits = []
        if request.prefill_len == 0:  # nothing to compute, nothing to draw
            for row in request.rows:
                row.finish("length")
                request.row_ended()
            return request
        with self._progress:
            if self._closed:
                raise EngineClosedError("this model has been closed")
            self.drafting.is_on |= drafter is not None
            self._inbox.add(request)
        return request

    def cancel(self, request: Request, *, if_idle: bool = True) -> None:
        """End all unfinished rows of the request with "cancelled", before the next step.

        `if_idle`: at once, if no thread drives; False leaves it to the next driver.
        """
        if self._step_lock.lost:
            return  # nobody runs it
        with self._progress:
            self._inbox.cancelled.append(request)
        if if_idle:
            self._process_inbox_if_idle()

    def run(self, until: Callable[[], bool]) -> None:
        """Take part in running the engine until `until()` is true; it is asked after every step.

        Ctrl-C in the main thread is raised between two steps, so that it breaks nobody's row.

        A step that fails ends its rows with "error" and leaves the cause in `request.error`. What
        fails for one row alone ends only that, with the cause in `row.error`.

        Raises:
            NothingToRunError: nothing is left to run, and `until()` is not true.
            ReentrantCallError: the engine's own step, in some row's function, asks for this.
        """
        with deferred_interrupts() as interrupted:
            self._step_lock.drive(self._step, lambda: bool(interrupted) or until())
            self._process_inbox_if_idle()  # what was cancelled while the last step ran

    def close(self, timeout: float | None = None) -> None:
        """End every row with "cancelled" and free the decoder. Safe to call twice.

        A step under way is waited for; if that takes `timeout` seconds, nothing is freed.
        """
        if self._step_lock.lost:
            return  # the step that was torn off may hold what would be freed
        with self._progress:
            self._step_lock.refuse_in_own_step()
            self._closed = True  # the driver's next step ends every row
            if not self._progress.wait_for(lambda: self._step_lock.driver is None, timeout):
                return
        with self._step_lock.held(wait=True):
            self._process_inbox()
            self._drain_steps()
            try:
                self.drafting.close()
            finally:
                self.decoder.close()

    @property
    def survives_fork(self) -> bool:
        return self.decoder.survives_fork

    def inherit(self) -> None:
        """In a forked child: end what the parent's other threads wait for; see forks.py."""
        self.drafting.inherit()
        rows = (*self._scheduler.running, *self._scheduler.waiting, *self._inbox.arrived)
        for request in dict.fromkeys(row.request for row in rows):
            if request.listener is not None or request.thread != threading.get_ident():
                request.listener = None
                self._inbox.cancelled.append(request)

    @contextmanager
    def between_steps(self) -> Iterator[Pause]:
        """A pause in which nobody steps: for forwards of one's own in leased blocks, and to make
        the decoder grow.

        Raises:
            EngineClosedError: the engine is closed.
        """
        with self._step_lock.claimed():
            if self._closed:
                raise EngineClosedError("this model has been closed")
            self._process_inbox()
            self._drain_steps()
            yield Pause(self.decoder, self._scheduler)
        self._process_inbox_if_idle()  # what was cancelled meanwhile

    def _process_inbox_if_idle(self) -> None:
        """Whoever drives sees what was cancelled; if nobody does, end it now."""
        while self._inbox.cancelled:
            with self._step_lock.held(wait=False) as driving:
                if not driving:
                    return  # its driver looks once more after it has left
                self._process_inbox()
                self._drain_steps()

    def _step(self) -> None:
        """Start a step, and wait for the one before; for this one, too, if the host has a part in
        it. What goes wrong in a step ends the rows of its batch, and no others.
        """
        if self._process_inbox() and not self._under_way:
            return  # that may be what the driver waits for
        runs_ahead = self._launch_next()
        while len(self._under_way) > runs_ahead:
            self._collect_step()
        if not any(row.finish_reason is None for row in self._rows_under_way()):
            self._drain_steps()

    def _launch_next(self) -> bool:
        """Start the next step, if any; returns whether another may be started before it ends."""
        rows: Sequence[Row] = ()
        admissions: Sequence[Admission] = ()
        with self._failing_together(lambda: rows or self._running_and(admissions)):
            admissions = self._scheduler.admit()
            for admission in admissions:
                self._start(admission)
            drafting = self.drafting
            plan = self._scheduler.schedule(drafting.make_drafts if drafting.is_on else None)
            if plan is not None:
                rows = [entry.row for entry in plan.entries]
                if plan.copies:
                    self.decoder.copy_blocks(plan.copies)
                step = drafting.timed_step(self.decoder, plan)
                for row in rows:
                    row.schedule.num_under_way += 1
                self._under_way.append((plan, step))
                waits = plan.num_drafted or needs_logits(plan) or drafting.holds_up(rows)
                return step.is_async and not waits
            if not admissions and not self._under_way:
                # the caller of `run` waits for something that cannot come
                rows = list(self._scheduler.waiting)
                raise NothingToRunError("there is no row that could run")
        return False

    def _collect_step(self) -> None:
        """Wait for the oldest step under way, and give its rows what they got of it."""
        plan, step = self._under_way[0]
        rows = [entry.row for entry in plan.entries]
        with self._failing_together(lambda: rows), ExitStack() as afterwards:
            afterwards.callback(self._free, rows)
            outputs = step_outputs(plan, step)  # all first: logits are gone after another call
            self.stats.count(plan)
            self._hand_out.give(plan.entries, outputs)

    def _free(self, rows: Sequence[Row]) -> None:
        """The oldest step holds its rows no more; those that have ended give back what they had,
        each of them whatever happens to another."""
        self._under_way.popleft()
        with ExitStack() as releases:
            for row in rows:
                row.schedule.num_under_way -= 1
                if row.finish_reason is not None and row.schedule.seat >= 0:
                    releases.callback(self._release, row)

    def _drain_steps(self) -> None:
        while self._under_way:
            self._collect_step()

    def _rows_under_way(self) -> Iterator[Row]:
        return (entry.row for plan, _ in self._under_way for entry in plan.entries)

    def _running_and(self, admissions: Sequence[Admission]) -> list[Row]:
        return [*self._scheduler.running, *(admission.row for admission in admissions)]

    @contextmanager
    def _failing_together(self, rows: Callable[[], Sequence[Row]]) -> Iterator[None]:
        """What is raised within ends these rows, and is theirs, if it is an Exception."""
        try:
            yield
        except BaseException as error:
            hurt = rows()
            self.stats.failed_steps += 1
            self._fail(hurt, error)
            if not (hurt and isinstance(error, Exception)):
                raise

    def _start(self, admission: Admission) -> None:
        """Make a row ready for its first step; if that cannot be done, end its request alone."""
        row = admission.row
        if row.finish_reason is not None:
            return  # with its request, another row of which could not be started
        try:
            if admission.error is not None:
                raise admission.error
            if admission.copies:
                self.decoder.copy_blocks(admission.copies)
            if not row.draws_on_host:
                self.decoder.bind(row.schedule.seat, row.params, row.token_ids)
                row.schedule.is_bound = True
        except Exception as error:
            self._end(row.request, "error", error)
        else:
            self.stats.reused_tokens = self._scheduler.num_reused_tokens
            if row.request.admitted is None:
                row.request.admitted = time.monotonic()

    def _end_between_tokens(self) -> None:
        """What a step gives one token a row does before each: see _process_inbox."""
        if self._closed or self._inbox.has_endings:
            self._process_inbox()

    def _process_inbox(self) -> bool:
        """End what was cancelled and what has run out of time; whether there was any."""
        with self._progress:
            pending = self._inbox.take()
        for row in pending.arrived:
            self._scheduler.waiting.add(row)
        if self._closed:
            rows = (*self._scheduler.running, *self._scheduler.waiting)
            pending.cancelled.extend(dict.fromkeys(row.request for row in rows))
        ended = [self._end(request, "cancelled") for request in pending.cancelled]
        ended += [self._end(request, "timeout") for request in pending.late]
        return any(ended)

    def _end(
        self, request: Request, reason: FinishReason, error: BaseException | None = None
    ) -> bool:
        """End the rows that have not ended yet; whether there were any."""
        if request.done:
            return False
        for row in request.rows:
            if row.finish_reason is None:
                row.finish(reason, error=error)
                self._release(row)
        return True

    def _release(self, row: Row) -> None:
        """Free all that a row held that has ended, when no step holds it any more."""
        if row.schedule.num_under_way:
            return
        try:
            if row.schedule.is_bound:
                self.decoder.release(row.schedule.seat)
        finally:
            row.schedule.is_bound = False
            had_seat = row.schedule.seat >= 0
            self._scheduler.remove(row)
            row.request.row_ended()
            if had_seat:
                self.drafting.ended(row)

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        for request in dict.fromkeys(row.request for row in rows):
            if any(row.finish_reason is None for row in request.rows):
                request.error = error
                self._end(request, "error", error)

    def check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Raise an error of the option `name` for the first that is no id of the vocabulary."""
        check_ids(name, token_ids, self._vocab_size)

    def check_request(self, token_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as ints, if add_request would take it; raises what that would raise."""
        check_params(params, self._vocab_size)
        prompt = checked_prompt(token_ids, params, self._vocab_size, self.decoder.limits)
        self.limits.check(len(prompt), params)
        return prompt
