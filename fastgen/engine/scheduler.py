"""Which rows run in a step: continuous batching over KV blocks, chunked prefill, prefix reuse.

Every step gives each decoding row its token first; what is left of the token budget goes to
prompts, in the order of the rows' turns. A row is admitted when it can have all the blocks that it
may ever need, so nothing admitted is ever preempted.

Why every row gets its turn:

1. Only finitely many rows go before a waiting one (waiting.py).
2. A row whose beginning a running row computes just now lets those behind it pass. They cannot
   prolong its wait: whoever would compute more of its beginning begins alike, and so waits itself.
   (Rows that score do not look; but a block is announced once, and the row has few.) The running
   row takes over its turn, and prompts get at least max_tokens - num_seats tokens of each step.
3. A row that only lacks blocks or a seat lets nobody pass, so what it lacks comes as soon as those
   that run have ended, each after at most max_seq_len tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastgen.decoders.interface import Capacity, Ints, StepBatch
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import BlockPool, blocks_needed
from fastgen.engine.queue import WaitingQueue
from fastgen.engine.requests import Row


@dataclass(slots=True)
class ScheduledRow:
    """A row's share of one step: `count` new tokens, the first at `start` in the row.

    `needs_draw`: its next token is drawn. `num_scored`: how many of its prompt's tokens get their
    log-probability from this step's logits.
    """

    row: Row
    start: int
    count: int
    needs_draw: bool
    num_scored: int = 0

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
    copies: list[tuple[int, int]] = field(default_factory=list)
    error: Exception | None = None


@dataclass(slots=True)
class StepPlan:
    """A step: its batch, and whose it is: first the rows that decode, then those that prefill."""

    batch: StepBatch
    entries: list[ScheduledRow]
    num_decoding: int


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
        """Let waiting rows run, in the order of their turns, as far as seats and blocks go.

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
                elif not passed[-1].awaits_prefix:
                    break
        finally:
            self.waiting.put_back(passed)
        return admissions

    def schedule(self) -> StepPlan | None:
        """The next step, at most max_tokens tokens and max_logits logits; None if no row can have
        one.

        Its tokens count as cached from now on: what is scheduled next, runs after it. A row's token
        that is still being drawn is fed as -1 - seat.
        """
        rows = [row for row in self.running if row.finish_reason is None]
        decoding = [row for row in rows if row.prefill_len <= row.num_cached < row.max_len - 1]
        entries = [ScheduledRow(row, row.num_cached, 1, True) for row in decoding]
        num_decoding = len(entries)
        if any(row.is_prefilling for row in rows):
            self._add_prefills(entries, rows)
            batch = self._batch(entries) if entries else None
        else:
            batch = self._decode_batch(decoding) if decoding else None
        for entry in entries:
            entry.row.num_cached += entry.count
        return None if batch is None else StepPlan(batch, entries, num_decoding)

    def advance(self, entry: ScheduledRow) -> None:
        """Its step has run: the blocks that it filled can be found."""
        row = entry.row
        if entry.end // BLOCK_SIZE > row.num_registered:
            self._register_full_blocks(row, entry.end // BLOCK_SIZE)
        if row.tail_key is not None and entry.end >= row.prompt_len:
            self.pool.register(row.tail_key, row.blocks[row.prompt_len // BLOCK_SIZE])
            row.tail_key = None

    def remove(self, row: Row) -> None:
        """Free a row's seat and blocks, or its place in the queue; harmless the second time."""
        self.waiting.remove(row)
        if row.seat >= 0:
            self.running.remove(row)
            self._free_seats.append(row.seat)
            row.seat = -1
            self._give_back(row)
            row.keys = []  # its request may have thousands of rows, and wait for the last

    def _admission(self, row: Row) -> Admission | None:
        """None if it has to wait, for a row that computes its beginning or for free blocks."""
        try:
            found = self._find_prefix(row)
            row.awaits_prefix = found is None
            copies = None if found is None else self._take_blocks(row, found)
            if copies is None:
                return None
            self._take_seat(row)
            return Admission(row, copies)
        except BaseException as error:
            self._give_back(row)
            if not isinstance(error, Exception):
                raise
            return Admission(row, error=error)

    def _find_prefix(self, row: Row) -> list[int] | None:
        """Blocks that hold the row's beginning; None while some other row is computing more."""
        row.make_keys()
        if row.scores_prompt:
            return []  # needs the logits of every token, so nothing can be left out
        found: list[int] = []
        for key in row.prompt_keys:
            pending = self.pool.pending(key)
            if pending is not None:
                self._lend_queue_key(row, pending)
                return None
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def _lend_queue_key(self, row: Row, pending: int) -> None:
        """Whoever fills the block that a row waits for does so in that row's turn, if earlier."""
        for other in self.running:
            if other.is_prefilling and pending in other.blocks:
                other.queue_key = min(other.queue_key, row.queue_key)

    def _take_blocks(self, row: Row, found: list[int]) -> list[tuple[int, int]] | None:
        """Give a row its blocks, those it found first; None, and none, if too few are free.

        Returns the copy, if any, that puts a found, partly used block into the row's own.
        """
        total = blocks_needed(row.max_len)
        last = row.prefill_len - 1  # computed in any case: it gives the logits, or the end
        num_cached = min(len(found) * BLOCK_SIZE, last)
        num_shared = num_cached // BLOCK_SIZE
        shared, tail = found[:num_shared], found[num_shared:]  # a tail: found, and written again
        self.pool.share(found)
        row.blocks = found  # at any moment what it has, to be given back
        if tail and total - num_shared > self.pool.num_free:  # no room for it and its copy
            row.blocks, num_cached = shared, num_shared * BLOCK_SIZE
            self.pool.release(tail)
            tail = []
        if total - num_shared > self.pool.num_free:
            self._give_back(row)
            return None
        row.blocks = shared + self.pool.allocate(total - num_shared)
        self.pool.release(tail)  # nobody writes there before it is copied
        row.token_ids = list(row.request.prompt_token_ids)
        row.num_cached, row.num_registered, row.num_shared = num_cached, num_shared, num_shared
        self._announce(row)
        self.num_reused_tokens += num_cached
        return [(tail[0], row.blocks[num_shared])] if num_cached % BLOCK_SIZE else []

    def _add_seats(self, num_seats: int) -> None:
        """The lowest free seat is taken first."""
        old, width = self._tables.shape
        self._tables = np.vstack([self._tables, np.zeros((num_seats - old, width), np.int32)])
        self._numbers: Ints = np.arange(num_seats + 1, dtype=np.int32)
        self._free_seats[:0] = reversed(range(old, num_seats))

    def _take_seat(self, row: Row) -> None:
        seat = self._free_seats[-1]
        self._tables[seat, : len(row.blocks)] = row.blocks
        row.seat = self._free_seats.pop()
        self.running.append(row)

    def _give_back(self, row: Row) -> None:
        """Free whatever blocks a row has, and forget what it announced for them."""
        announced = [*row.keys, row.tail_key] if row.tail_key is not None else row.keys
        self.pool.forget_pending(announced, row.blocks)
        self.pool.release(row.blocks)
        row.blocks = []

    def _announce(self, row: Row) -> None:
        """Tell rows with the same beginning that this one is computing it."""
        for index, key in enumerate(row.prompt_keys):
            end = min((index + 1) * BLOCK_SIZE, row.prompt_len)
            if row.num_cached < end <= row.prefill_len:
                self.pool.register(key, row.blocks[index], pending=True)

    def _register_full_blocks(self, row: Row, end: int) -> None:
        for index in range(row.num_registered, end):
            if index == len(row.keys):  # filled by drawn tokens
                row.add_key()
            self.pool.register(row.keys[index], row.blocks[index])
        row.num_registered = end

    def _add_prefills(self, entries: list[ScheduledRow], rows: list[Row]) -> None:
        """Prompt tokens for what the decoding rows leave of the step."""
        room = (self.limits.max_tokens - len(entries), self.limits.max_logits - len(entries))
        budget = _Budget(*room, entries)
        prefilling = [row for row in rows if row.is_prefilling]
        for row in sorted(prefilling, key=lambda row: row.queue_key):
            _add_prefill(row, budget)

    def _decode_batch(self, rows: list[Row]) -> StepBatch:
        """What _batch makes of one new token for each row; nearly all steps are such."""
        count = len(rows)
        cache_lens = np.array([row.num_cached for row in rows], np.int32)
        seats = np.array([row.seat for row in rows], np.int32)
        tables = self._tables[seats]
        on_host = [row.draws_on_host for row in rows]
        if True in on_host:
            seats[on_host] = -1
        return StepBatch(
            token_ids=np.array([_next_fed(row) for row in rows], np.int32),
            positions=cache_lens,
            row_starts=self._numbers[: count + 1],
            cache_lens=cache_lens,
            block_tables=tables,
            logits_at=self._numbers[:count],
            seats=seats,
        )

    def _batch(self, entries: list[ScheduledRow]) -> StepBatch:
        counts = np.array([entry.count for entry in entries], np.int32)
        cache_lens = np.array([entry.start for entry in entries], np.int32)
        row_starts = np.zeros(len(entries) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        row_of = np.repeat(np.arange(len(entries)), counts)  # (N,)
        offsets = np.arange(len(row_of), dtype=np.int32) - row_starts[row_of]
        tokens: list[int] = []
        logits_at: list[int] = []
        seats: list[int] = []
        for entry in entries:
            first, row = len(tokens), entry.row
            if row.is_prefilling:
                tokens += row.token_ids[entry.start : entry.end]
            else:
                tokens.append(_next_fed(row))
            if entry.num_scored:
                logits_at += range(first, first + entry.num_scored)
                seats += [-1] * entry.num_scored
            if entry.needs_draw:
                logits_at.append(len(tokens) - 1)
                seats.append(-1 if row.draws_on_host else row.seat)
        return StepBatch(
            token_ids=np.array(tokens, np.int32),
            positions=cache_lens[row_of] + offsets,
            row_starts=row_starts,
            cache_lens=cache_lens,
            block_tables=self._tables[[entry.row.seat for entry in entries]],
            logits_at=np.array(logits_at, np.int32),
            seats=np.array(seats, np.int32),
        )


def _next_fed(row: Row) -> int:
    """The next token of a row that decodes, or which seat is still drawing it."""
    token_ids = row.token_ids
    return token_ids[-1] if len(token_ids) > row.num_cached else -1 - row.seat


def _add_prefill(row: Row, budget: _Budget) -> None:
    """As many of the row's next prompt tokens as the budget has room for."""
    start, end = row.num_cached, row.prefill_len
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
