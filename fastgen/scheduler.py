"""Which rows run in a step: continuous batching over KV blocks, chunked prefill, prefix reuse.

Every step gives each decoding row its token first; what is left of the token budget goes to
prompts, in the order in which the rows came. A row is admitted when it can have all the blocks that
it may ever need, so nothing admitted is ever preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fastgen.decoders.interface import DecoderLimits, Ints, StepBatch
from fastgen.kv_cache import BLOCK_SIZE, BlockPool, blocks_for
from fastgen.request import Row


@dataclass(slots=True)
class Entry:
    """A row's share of one step: `count` new tokens, the first at `start` in the row.

    `draws`: its next token is drawn. `scores`: how many of its prompt's tokens get their
    log-probability from this step's logits.
    """

    row: Row
    start: int
    count: int
    draws: bool
    scores: int = 0


@dataclass(slots=True)
class StepPlan:
    batch: StepBatch
    entries: list[Entry]


@dataclass(slots=True)
class _Budget:
    tokens: int
    logits: int
    entries: list[Entry] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.tokens -= entry.count
        self.logits -= entry.scores + entry.draws


class Scheduler:
    """Rows that wait and rows that run, their seats and their blocks. One thread at a time."""

    def __init__(self, limits: DecoderLimits) -> None:
        if limits.block_size != BLOCK_SIZE:
            raise ValueError(f"decoder blocks hold {limits.block_size} tokens, not {BLOCK_SIZE}")
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.num_reused_tokens = 0  # prompt tokens found in the cache
        self._free_seats = list(range(limits.num_seats))[::-1]
        width = blocks_for(limits.max_seq_len)
        self._tables: Ints = np.zeros((limits.num_seats, width), np.int32)

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def admit(self) -> tuple[list[Row], list[tuple[int, int]]]:
        """Move waiting rows to running ones, in order, as far as seats and blocks go.

        Returns:
            The rows, each with a seat, and KV blocks to be copied (source, destination) before the
            next step.
        """
        admitted: list[Row] = []
        sources: list[int] = []
        copies: list[tuple[int, int]] = []
        while self.waiting and self._free_seats:
            copy = self._take_blocks(self.waiting[0])
            if copy is None:
                break
            row = self.waiting.popleft()
            row.seat = self._free_seats.pop()
            self._tables[row.seat, : len(row.blocks)] = row.blocks
            self.running.append(row)
            admitted.append(row)
            copies += copy
            sources += [source for source, _ in copy]
        self.pool.release(sources)  # were held so that no row admitted meanwhile could take them
        return admitted, copies

    def schedule(self) -> StepPlan | None:
        """The next step, at most max_tokens tokens and max_logits logits; None if no row runs."""
        budget = _Budget(self.limits.max_tokens, self.limits.max_logits)
        for row in self.running:
            if not row.is_prefilling:
                budget.add(Entry(row, row.num_cached, 1, draws=True))
        for row in self.running:
            if row.is_prefilling:
                _add_prefill(row, budget)
        if not budget.entries:
            return None
        return StepPlan(self._batch(budget.entries), budget.entries)

    def advance(self, entries: Iterable[Entry]) -> None:
        """The step has run: its tokens are in the cache, and their blocks can be found."""
        for entry in entries:
            row = entry.row
            row.num_cached += entry.count
            if row.num_cached // BLOCK_SIZE > row.num_registered:
                self._register_full_blocks(row)
            if row.tail_key is not None and row.num_cached >= row.prompt_len:
                self.pool.register(row.tail_key, row.blocks[row.prompt_len // BLOCK_SIZE])
                row.tail_key = None

    def remove(self, row: Row) -> None:
        """Free a row's seat and blocks, or its place in the queue; harmless the second time."""
        if row.seat < 0:
            if row in self.waiting:
                self.waiting.remove(row)
            return
        self.running.remove(row)
        self._free_seats.append(row.seat)
        row.seat = -1
        announced = [*row.keys, row.tail_key] if row.tail_key is not None else row.keys
        self.pool.forget_pending(announced, row.blocks)
        self.pool.release(row.blocks)
        row.blocks = []

    def _take_blocks(self, row: Row) -> list[tuple[int, int]] | None:
        """Give a row its blocks, those it shares first; None if it has to wait.

        It waits for blocks, and for another row that is computing the same beginning. Returns the
        copy, if any, that puts a found, partly used block into the row's own.
        """
        row.make_keys()
        found = self._find_prefix(row)
        if found is None:
            return None
        total = blocks_for(max(row.max_len - 1, row.request.prefill_len))  # the last is never fed
        num_cached = min(len(found) * BLOCK_SIZE, row.prompt_len - 1)  # the last gives the logits
        shared = found[: num_cached // BLOCK_SIZE]
        self.pool.share(found)
        if total - len(shared) > self.pool.num_free and len(found) > len(shared):
            self.pool.release(found[len(shared) :])  # there may be no room for it and its copy
            found, num_cached = shared, len(shared) * BLOCK_SIZE
        if total - len(shared) > self.pool.num_free:
            self.pool.release(found)
            return None
        row.token_ids = list(row.request.prompt_token_ids)
        row.blocks = shared + self.pool.allocate(total - len(shared))
        row.num_cached, row.num_registered = num_cached, len(shared)
        self.num_reused_tokens += num_cached
        self._announce(row)
        if num_cached % BLOCK_SIZE:  # goes on within a block that others read: copy on write
            return [(found[len(shared)], row.blocks[len(shared)])]
        self.pool.release(found[len(shared) :])
        return []

    def _find_prefix(self, row: Row) -> list[int] | None:
        """Blocks that hold the row's beginning; None while some other row is computing more."""
        if row.scores_prompt:
            return []  # needs the logits of every token, so nothing can be left out
        found: list[int] = []
        for key in row.prompt_keys:
            if self.pool.is_pending(key):
                return None
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def _announce(self, row: Row) -> None:
        """Tell rows with the same beginning that this one is computing it."""
        for index, key in enumerate(row.prompt_keys):
            end = min((index + 1) * BLOCK_SIZE, row.prompt_len)
            if row.num_cached < end <= row.request.prefill_len:
                self.pool.register(key, row.blocks[index], pending=True)

    def _register_full_blocks(self, row: Row) -> None:
        for index in range(row.num_registered, row.num_cached // BLOCK_SIZE):
            if index == len(row.keys):  # filled by drawn tokens
                row.add_key(index)
            self.pool.register(row.keys[index], row.blocks[index])
        row.num_registered = row.num_cached // BLOCK_SIZE

    def _batch(self, entries: list[Entry]) -> StepBatch:
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
            tokens += row.token_ids[entry.start : entry.start + entry.count]
            if entry.scores:
                logits_at += range(first, first + entry.scores)
                seats += [-1] * entry.scores
            if entry.draws:
                logits_at.append(len(tokens) - 1)
                seats.append(row.seat)
        return StepBatch(
            token_ids=np.array(tokens, np.int32),
            positions=cache_lens[row_of] + offsets,
            row_starts=row_starts,
            cache_lens=cache_lens,
            block_tables=self._tables[[entry.row.seat for entry in entries]],
            logits_at=np.array(logits_at, np.int32),
            seats=np.array(seats, np.int32),
        )


def _add_prefill(row: Row, budget: _Budget) -> None:
    """As many of the row's next prompt tokens as the budget has room for."""
    start, end = row.num_cached, row.request.prefill_len
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
        budget.add(Entry(row, start, count, draws, scores=count - draws if scored else 0))
