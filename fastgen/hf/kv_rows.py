"""Rows of keys and values in an engine's KV blocks, for callers that make their own forwards.

The engine's own rows live in the same blocks, so both find what the other has computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.decoders.interface import Decoder, Logits, StepBatch
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import Key, block_keys, blocks_needed, next_key
from fastgen.engine.engine import Engine
from fastgen.engine.interrupts import deferred_interrupts
from fastgen.engine.scheduler import Scheduler

Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class KvRow:
    """A row whose first tokens are in the cache.

    Attributes:
        token_ids: the tokens that are in the cache.
        blocks: where; never more than they need, and as many as they need.
        plain: the tokens stand at positions 0, 1, 2, ...; only then are blocks known by content.
    """

    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    plain: bool = True
    keys: list[Key] = field(default_factory=list)  # of full blocks that can be found

    def copy(self) -> KvRow:
        """The same tokens in the same blocks, whose owners the caller counts."""
        return KvRow(self.token_ids[:], self.blocks[:], self.plain, self.keys[:])

    def cut(self, num_tokens: int) -> list[int]:
        """Keep the first tokens only; returns the blocks that the row no longer needs."""
        del self.token_ids[num_tokens:]
        spare = self.blocks[blocks_for(num_tokens) :]
        del self.blocks[blocks_for(num_tokens) :]
        del self.keys[num_tokens // BLOCK_SIZE :]
        return spare


class NewTokens(NamedTuple):
    """What a forward adds to a row: tokens at their positions; logits of the last `num_wanted`."""

    row: KvRow
    token_ids: Ints  # (n,)
    positions: Ints  # (n,)
    num_wanted: int


class _Piece(NamedTuple):
    """A part of one row's new tokens that fits in one step."""

    new: NewTokens
    start: int
    end: int

    @property
    def num_wanted(self) -> int:
        first = len(self.new.token_ids) - self.new.num_wanted
        return max(0, self.end - max(self.start, first))


class KvRows:
    """Forwards over rows in one engine's blocks, between its steps. Thread-safe."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine, self.vocab_size = engine, vocab_size
        self._released: deque[list[int]] = deque()  # by whoever, in any thread, at any time

    @property
    def decoder(self) -> Decoder:
        return self.engine.decoder

    @contextmanager
    def room_for(self, max_lens: Iterable[int]) -> Iterator[None]:
        """Make room for rows that get so many tokens, as many at once as a step has logits.

        They are added to the engine inside, before anybody else can take the blocks.
        """
        needs = [blocks_needed(max_len) for max_len in max_lens]
        with self._between_steps() as scheduler:
            self._make_room(scheduler, needs)
            yield

    def release(self, rows: Iterable[KvRow]) -> None:
        """Give the rows' blocks back, before the next forward. From any thread, at any time."""
        self._released.extend(row.blocks for row in rows)

    def release_blocks(self, blocks: list[int]) -> None:
        """Give back some that a row no longer needs."""
        self._released.append(blocks)

    def copies(self, rows: Sequence[KvRow]) -> list[KvRow]:
        """Rows that share these rows' blocks, until either writes."""
        with self._between_steps() as scheduler:
            for row in rows:
                scheduler.pool.share(row.blocks)
            return [row.copy() for row in rows]

    def find(self, row: KvRow, token_ids: Ints) -> None:
        """Let an empty, plain row share the blocks that the cache has of its prefix."""
        keys = block_keys(token_ids.tolist())[: len(token_ids) // BLOCK_SIZE]
        with self._between_steps() as scheduler:
            for key in keys:
                block = scheduler.pool.find(key)
                if block is None:
                    break
                scheduler.pool.share([block])
                row.blocks.append(block)
                row.keys.append(key)
        row.token_ids = token_ids[: len(row.blocks) * BLOCK_SIZE].tolist()

    def forward(self, work: Sequence[NewTokens], out: Logits) -> None:
        """Put new tokens into the rows' caches.

        Args:
            work: no row occurs twice.
            out: float32 (sum of num_wanted, V), gets the logits, in the order of the work.

        Raises:
            ValueError, MemoryError: there is no memory for the blocks; nothing has changed then.
        """
        before = [len(new.row.token_ids) for new in work]
        with self._between_steps() as scheduler:
            try:
                self._take_blocks(scheduler, work)
                self._compute(work, out)
            except BaseException:
                for new, count in zip(work, before, strict=True):
                    self.release_blocks(new.row.cut(count))
                raise
            for new in work:
                _register(scheduler, new.row)

    def _compute(self, work: Sequence[NewTokens], out: Logits) -> None:
        at = 0
        for pieces in self._steps(work):
            count = sum(piece.num_wanted for piece in pieces)
            logits = self.decoder.forward(_batch(pieces))
            out[at : at + count] = logits.cpu() if hasattr(logits, "cpu") else logits
            at += count
            for new, start, end in pieces:
                new.row.token_ids += new.token_ids[start:end].tolist()

    @contextmanager
    def _between_steps(self) -> Iterator[Scheduler]:
        with deferred_interrupts(), self.engine.between_steps() as scheduler:
            while self._released:
                scheduler.pool.release(self._released.popleft())
            yield scheduler

    def _make_room(self, scheduler: Scheduler, needs: Sequence[int], extra: int = 0) -> None:
        """For rows that need so many blocks each, those that wait anyway, and `extra` blocks."""
        limits = self.decoder.limits
        waiting = [blocks_needed(row.max_len) for row in scheduler.waiting]
        num_rows = len(scheduler.running) + len(waiting) + len(needs)
        seats = max(limits.num_seats, min(num_rows, limits.max_logits))
        most = sorted([*waiting, *needs], reverse=True)[: limits.max_logits]
        missing = max(0, sum(most) + extra - scheduler.pool.num_free)
        if missing and extra:  # rows that grow token by token come again soon
            missing = max(missing, limits.num_blocks // 2)
        if missing or seats > limits.num_seats:
            self.decoder.reserve(limits.num_blocks + missing, seats)
            scheduler.grow(self.decoder.limits)

    def _take_blocks(self, scheduler: Scheduler, work: Sequence[NewTokens]) -> None:
        """Blocks for the new tokens; a partly filled one that others own is copied first."""
        pool = scheduler.pool
        most = sum(blocks_for(len(new.token_ids)) + 1 for new in work)
        if most > pool.num_free or scheduler.waiting:
            self._make_room(scheduler, [], extra=most)
        copies: list[tuple[int, int]] = []
        for row, token_ids, _, _ in work:
            if len(row.token_ids) % BLOCK_SIZE:
                tail = row.blocks[-1]
                if pool.ref_count(tail) > 1:
                    [row.blocks[-1]] = pool.allocate(1)
                    copies.append((tail, row.blocks[-1]))
                    pool.release([tail])
                else:
                    pool.forget([tail])  # who knew it by content may find other content soon
            total = blocks_for(len(row.token_ids) + len(token_ids))
            row.blocks += pool.allocate(total - len(row.blocks))
        if copies:
            self.decoder.copy_blocks(copies)

    def _steps(self, work: Sequence[NewTokens]) -> Iterator[list[_Piece]]:
        """The work in steps of at most max_tokens tokens and max_logits logits."""
        limits = self.decoder.limits
        tokens, logits, pieces = limits.max_tokens, limits.max_logits, list[_Piece]()
        for new in work:
            start, end = 0, len(new.token_ids)
            while start < end:
                silent = max(0, end - new.num_wanted - start)
                count = min(end - start, tokens, silent + logits)
                if count == 0:
                    yield pieces
                    tokens, logits, pieces = limits.max_tokens, limits.max_logits, []
                    continue
                pieces.append(_Piece(new, start, start + count))
                tokens -= count
                logits -= pieces[-1].num_wanted
                start += count
        if pieces:
            yield pieces


def _batch(pieces: Sequence[_Piece]) -> StepBatch:
    counts = np.array([end - start for _, start, end in pieces], np.int32)
    row_starts = np.zeros(len(pieces) + 1, np.int32)
    np.cumsum(counts, out=row_starts[1:])
    tables = np.zeros((len(pieces), max(len(new.row.blocks) for new, _, _ in pieces)), np.int32)
    for table, (new, _, _) in zip(tables, pieces, strict=True):
        table[: len(new.row.blocks)] = new.row.blocks
    wanted = [
        np.arange(at - p.num_wanted, at) for p, at in zip(pieces, row_starts[1:], strict=True)
    ]
    return StepBatch(
        token_ids=_joined(new.token_ids[start:end] for new, start, end in pieces),
        positions=_joined(new.positions[start:end] for new, start, end in pieces),
        row_starts=row_starts,
        cache_lens=np.array([len(new.row.token_ids) for new, _, _ in pieces], np.int32),
        block_tables=tables,
        logits_at=_joined(wanted),
        seats=np.full(sum(map(len, wanted)), -1, np.int32),
    )


def _joined(arrays: Iterable[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate(list(arrays)).astype(np.int32)


def _register(scheduler: Scheduler, row: KvRow) -> None:
    """Make the blocks that are full findable by content."""
    while row.plain and len(row.keys) < len(row.token_ids) // BLOCK_SIZE:
        row.keys.append(next_key(row.keys, row.token_ids, None))
        scheduler.pool.register(row.keys[-1], row.blocks[len(row.keys) - 1])


def logits_of(kv: KvRows, token_ids: Ints, num_wanted: int) -> NDArray[np.float32]:
    """Logits float32 (num_wanted, V) of the last tokens of a row (n,), which is not kept."""
    row = KvRow()
    try:
        kv.find(row, token_ids[:-num_wanted])
        cached, positions = len(row.token_ids), np.arange(len(token_ids))
        logits = np.empty((num_wanted, kv.vocab_size), np.float32)
        kv.forward([NewTokens(row, token_ids[cached:], positions[cached:], num_wanted)], logits)
    finally:
        kv.release([row])
    return logits
