"""Which rows run in a step: continuous batching over KV blocks, chunked prefill, prefix reuse.

Every step gives each decoding row its token first; what is left of the token budget goes to
prompts, in the order of the rows' queue keys. A row is admitted when it can have all the blocks
that it may ever need, so nothing admitted is ever preempted.

Why every row is admitted in the end:

1. Only finitely many rows go before a waiting one (queue.py).
2. A row waits while a running row computes its prefix, and later rows may pass it. They cannot
   prolong its wait: any row that would extend the same prefix has that prefix, so it waits as well.
   (Rows that score their prompt do not wait; but each announces a block at most once, and a prompt
   has few.) The running row takes over the waiting row's queue key, and prompts get at least
   max_tokens - num_seats tokens of each step.
3. A row that only lacks blocks or a seat lets nobody pass, so what it lacks comes as soon as those
   that run have ended, each after at most max_seq_len tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastgen.decoders.interface import Capacity, Ints, StepBatch
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import BlockPool, blocks_needed
from fastgen.engine.leases import Acquired, Copies, Lease, PrefixPending
from fastgen.engine.queue import WaitingQueue
from fastgen.engine.requests import Row

# Of the rows that may have drafts, the number of rows in the step, and how many more tokens it has
# room for: one draft a row, which may be empty.
MakeDrafts = Callable[[Sequence[Row], int, int], Sequence[Sequence[int]]]


@dataclass(slots=True)
class ScheduledRow:
    """A row's share of one step: `count` new tokens, the first at `start` in the row.

    `needs_draw`: its next token is drawn. `num_scored`: how many of its prompt's tokens get their
    log-probability from this step's logits. `drafts`: tokens that are taken for granted after the
    first; a token is drawn after each of them, too.
    """

    row: Row
    start: int
    count: int
    needs_draw: bool
    num_scored: int = 0
    drafts: Sequence[int] = ()

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def num_host_logits(self) -> int:
        """Rows of logits that the host needs for it."""
        return self.num_scored + (self.needs_draw and self.row.draws_on_host)


@dataclass(slots=True)
class Admission:
    """What became of a row that left the queue.

    `copies`: KV blocks (source, destination) to be copied before the next step, those of earlier
    admissions first. `error`: it could not be admitted, and has nothing.
    """

    row: Row
    copies: Copies = ()
    error: Exception | None = None


@dataclass(slots=True)
class StepPlan:
    """A step: its batch, and whose it is: first the rows that decode, then those that prefill.

    `copies`: KV blocks (source, destination) to be copied before it runs.
    """

    batch: StepBatch
    entries: list[ScheduledRow]
    num_decoding: int
    copies: Copies
    num_drafted: int = 0


@dataclass(slots=True)
class _Budget:
    tokens: int
    logits: int
    entries: list[ScheduledRow]

    def add(self, entry: ScheduledRow) -> None:
        self.entries.append(entry)
        self.tokens -= entry.count
        self.logits -= entry.num_scored + entry.needs_draw


class Scheduler:
    """Rows that wait and rows that run, their seats and their blocks. One thread at a time."""

    def __init__(self, limits: Capacity) -> None:
        if limits.block_size != BLOCK_SIZE:
            raise ValueError(f"decoder blocks hold {limits.block_size} tokens, not {BLOCK_SIZE}")
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.waiting = WaitingQueue()
        self.running: list[Row] = []
        self.num_reused_tokens = 0  # prompt tokens found in the cache
        self._free_seats: list[int] = []
        self._tables: Ints = np.zeros((0, blocks_for(limits.max_seq_len)), np.int32)
        self._add_seats(limits.num_seats)

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def grow(self, limits: Capacity) -> None:
        """The decoder has more blocks or seats now; rows that run keep theirs."""
        self.pool.grow(limits.num_blocks)
        self._add_seats(limits.num_seats)
        self.limits = limits

    def admit(self) -> list[Admission]:
        """Let waiting rows run, in the order of their queue keys, as far as seats and blocks go.

        At most as many are passed over as there are seats, so that a step's work is bounded.
        """
        admissions: list[Admission] = []
        passed: list[Row] = []  # out of the queue, and not admitted
        try:
            while self._free_seats and self.waiting and len(passed) < self.limits.num_seats:
                passed.append(self.waiting.pop())
                admission = self._admission(passed[-1])
                if admission is not None:
                    admissions.append(admission)
                    passed.pop()
                elif not passed[-1].schedule.awaits_prefix:
                    break
        finally:
            self.waiting.put_back(passed)
        return admissions

    def schedule(self, make_drafts: MakeDrafts | None = None) -> StepPlan | None:
        """The next step, at most max_tokens tokens and max_logits logits; None if no row can have
        one.

        Its tokens count as cached from now on: what is scheduled next, runs after it. A row's token
        that is still being drawn is fed as -1 - seat.

        Args:
            make_drafts: is asked where no prompt waits to be computed: a prompt fills a step.
        """
        entries: list[ScheduledRow] = []
        prefilling: list[Row] = []
        for row in self.running:
            if row.finish_reason is not None:
                continue
            num_cached = row.schedule.lease.num_tokens
            if num_cached < row.prefill_len:
                prefilling.append(row)
            elif num_cached < row.max_len - 1:
                entries.append(ScheduledRow(row, num_cached, 1, True))
        num_decoding = len(entries)
        if prefilling:
            self._add_prefills(entries, prefilling)
        if not entries:
            return None
        num_drafted = 0
        if make_drafts is not None and not prefilling:
            num_drafted = self._add_drafts(entries, make_drafts)
        copies = self._extend(entries)
        is_ragged = prefilling or num_drafted
        batch = self._batch(entries) if is_ragged else self._decode_batch(entries)
        return StepPlan(batch, entries, num_decoding, copies, num_drafted)

    def advance(self, entry: ScheduledRow) -> None:
        """Its step has run: the blocks that it filled can be found."""
        row, end = entry.row, entry.start + entry.count
        lease = row.schedule.lease
        if end >= lease.register_at:
            lease.register(end, row.token_ids)

    def remove(self, row: Row) -> None:
        """Free a row's seat and blocks, or its place in the queue; harmless the second time."""
        self.waiting.remove(row)
        state = row.schedule
        if state.seat >= 0:
            self.running.remove(row)
            self._free_seats.append(state.seat)
            state.seat = -1
            state.lease.release()

    def lease(self, cache_salt: str | None = None) -> Lease:
        """One that holds nothing yet."""
        return Lease(self.pool, cache_salt)

    def _admission(self, row: Row) -> Admission | None:
        """None if it has to wait, for a row that computes its beginning or for free blocks."""
        lease = self.lease(row.request.cache_salt)
        try:
            outcome = lease.acquire(
                row.request.block_keys,
                row.prompt_len,
                # The last token is computed in any case: it gives the logits, or the end. A row
                # that scores needs every token's logits.
                reuse=None if row.scores_prompt else row.prefill_len - 1,
                announce=row.prefill_len,
                num_blocks=blocks_needed(row.max_len),
                wait=True,
            )
            row.schedule.awaits_prefix = isinstance(outcome, PrefixPending)
            if isinstance(outcome, PrefixPending):
                self._lend_queue_key(row, outcome.block)
            if not isinstance(outcome, Acquired):
                return None
            self._seat(row, lease)
            return Admission(row, outcome.copies)
        except BaseException as error:
            lease.release()
            if not isinstance(error, Exception):
                raise
            return Admission(row, error=error)

    def _lend_queue_key(self, row: Row, pending: int) -> None:
        """The row that fills the block takes over the waiting row's queue key, if that is lower."""
        for other in self.running:
            state = other.schedule
            if pending in state.lease.blocks and is_prefilling(other):
                state.queue_key = min(state.queue_key, row.schedule.queue_key)

    def _add_seats(self, num_seats: int) -> None:
        """The lowest free seat is taken first."""
        old, width = self._tables.shape
        self._tables = np.vstack([self._tables, np.zeros((num_seats - old, width), np.int32)])
        self._free_seats[:0] = reversed(range(old, num_seats))

    def _seat(self, row: Row, lease: Lease) -> None:
        """Give a row its blocks and a seat: from now on it runs."""
        seat = self._free_seats[-1]
        self._tables[seat, : len(lease.blocks)] = lease.blocks
        row.token_ids = list(row.request.prompt_token_ids)
        row.schedule.lease, row.schedule.seat = lease, self._free_seats.pop()
        self.num_reused_tokens += lease.num_tokens
        self.running.append(row)

    def _extend(self, entries: list[ScheduledRow]) -> Copies:
        """Count the step's tokens as cached; the blocks to be copied before they are written."""
        copies: list[tuple[int, int]] = []
        for entry in entries:
            state = entry.row.schedule
            if new := state.lease.extend(entry.count):
                copies += new
                self._tables[state.seat, : len(state.lease.blocks)] = state.lease.blocks
        return copies

    def _add_drafts(self, entries: list[ScheduledRow], make_drafts: MakeDrafts) -> int:
        """Drafts for rows whose last token is known and that may still get more than one; returns
        how many tokens they have."""
        taking = [
            entry
            for entry in entries
            if len(entry.row.token_ids) == entry.start + 1 < entry.row.max_len - 1
            and not entry.row.draws_on_host
        ]
        room = min(self.limits.max_tokens, self.limits.max_logits) - len(entries)
        if not taking or room <= 0:
            return 0
        total = 0
        drafts = make_drafts([entry.row for entry in taking], len(entries), room)
        for entry, draft in zip(taking, drafts, strict=True):
            if draft:
                entry.drafts, entry.count = draft, 1 + len(draft)
                total += len(draft)
                # its worst case: the row's last token is never fed
                assert entry.end < entry.row.max_len, "a draft exceeds its row"
        assert total <= room, "drafts exceed the step"
        return total

    def _add_prefills(self, entries: list[ScheduledRow], prefilling: list[Row]) -> None:
        """Prompt tokens for what the decoding rows leave of the step."""
        room = (self.limits.max_tokens - len(entries), self.limits.max_logits - len(entries))
        budget = _Budget(*room, entries)
        for row in sorted(prefilling, key=lambda row: row.schedule.queue_key):
            _add_prefill(row, budget)

    def _decode_batch(self, entries: list[ScheduledRow]) -> StepBatch:
        """What _batch makes of one new token for each row."""
        rows = [entry.row for entry in entries]
        seats = np.array([row.schedule.seat for row in rows], np.int32)
        tables = self._tables[seats]
        on_host = [row.draws_on_host for row in rows]
        if True in on_host:
            seats[on_host] = -1
        token_ids = [_next_fed(entry) for entry in entries]
        return StepBatch.decode(token_ids, [entry.start for entry in entries], tables, seats)

    def _batch(self, entries: list[ScheduledRow]) -> StepBatch:
        tokens: list[int] = []
        logits_at: list[int] = []
        seats: list[int] = []
        for entry in entries:
            first, row = len(tokens), entry.row
            if entry.start < row.prefill_len:
                tokens += row.token_ids[entry.start : entry.end]
            else:
                tokens += (_next_fed(entry), *entry.drafts)
            if entry.num_scored:
                logits_at += range(first, first + entry.num_scored)
                seats += [-1] * entry.num_scored
            if entry.needs_draw:
                num_draws = 1 + len(entry.drafts)
                logits_at += range(len(tokens) - num_draws, len(tokens))
                seats += [-1 if row.draws_on_host else row.schedule.seat] * num_draws
        return StepBatch.ragged(
            token_ids=tokens,
            counts=[entry.count for entry in entries],
            cache_lens=[entry.start for entry in entries],
            block_tables=self._tables[[entry.row.schedule.seat for entry in entries]],
            logits_at=logits_at,
            seats=seats,
        )


def is_prefilling(row: Row) -> bool:
    """Whether a running row's cache lacks prompt tokens; afterwards it gets a token a step."""
    return row.schedule.lease.num_tokens < row.prefill_len


def _next_fed(entry: ScheduledRow) -> int:
    """The next token of a row that decodes, or which seat is still drawing it."""
    row = entry.row
    token_ids = row.token_ids
    return token_ids[-1] if len(token_ids) > entry.start else -1 - row.schedule.seat


def _add_prefill(row: Row, budget: _Budget) -> None:
    """As many of the row's next prompt tokens as the budget has room for."""
    start, end = row.schedule.lease.num_tokens, row.prefill_len
    scored = row.scores_prompt
    draws_at_end = row.request.params.max_new_tokens > 0
    count = min(end - start, budget.tokens)
    if scored:  # each token's logits score the next one
        count = min(count, budget.logits)
    draws = draws_at_end and start + count == end
    if draws and not scored and budget.logits < 1:
        count -= 1
        draws = False
    if count > 0:
        budget.add(
            ScheduledRow(row, start, count, draws, num_scored=count - draws if scored else 0)
        )
