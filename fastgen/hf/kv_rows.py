"""Rows of keys and values in an engine's KV blocks, for callers that make their own forwards.

The engine's own rows live in the same blocks, so both find what the other has computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.decoders.interface import Decoder, Logits, StepBatch
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import block_keys
from fastgen.engine.engine import Engine
from fastgen.engine.interrupts import deferred_interrupts
from fastgen.engine.leases import Lease
from fastgen.engine.pause import Pause

Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class KvRow:
    """A row whose first tokens are in the cache.

    Attributes:
        token_ids: the tokens that are in the cache.
        lease: their blocks; None as long as there are none.
        plain: the tokens stand at positions 0, 1, 2, ...; only then are blocks known by content.
    """

    token_ids: list[int] = field(default_factory=list)
    lease: Lease | None = None
    plain: bool = True


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
        # (lease, tokens to keep), from any thread, at any time
        self._cuts: deque[tuple[Lease, int]] = deque()

    @property
    def decoder(self) -> Decoder:
        return self.engine.decoder

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions."""
        return self.decoder.limits.max_seq_len

    @contextmanager
    def room_for(self, max_lens: Iterable[int]) -> Iterator[None]:
        """Make room for rows that get so many tokens, as many at once as a step has logits.

        They are added to the engine inside, before anybody else can take the blocks.
        """
        lens = list(max_lens)
        with self._between_steps() as pause:
            pause.reserve_rows(lens)
            yield

    def release(self, rows: Iterable[KvRow]) -> None:
        """Give the rows' blocks back, before the next forward. From any thread, at any time."""
        self._cuts.extend((row.lease, 0) for row in rows if row.lease is not None)

    def cut(self, row: KvRow, num_tokens: int) -> None:
        """Let the row have its first tokens only; their blocks go before the next forward."""
        if num_tokens < len(row.token_ids) and row.lease is not None:
            del row.token_ids[num_tokens:]
            self._cuts.append((row.lease, num_tokens))

    def copies(self, rows: Sequence[KvRow]) -> list[KvRow]:
        """Rows that share these rows' blocks, until either writes."""
        with self._between_steps():
            return [
                KvRow(row.token_ids[:], row.lease and row.lease.share(), row.plain) for row in rows
            ]

    def find(self, row: KvRow, token_ids: Ints) -> None:
        """Let an empty, plain row share the blocks that the cache has of its prefix."""
        keys = block_keys(token_ids.tolist())[: len(token_ids) // BLOCK_SIZE]
        num_tokens = BLOCK_SIZE * len(keys)
        with self._between_steps() as pause:
            lease = _lease_of(row, pause)
            lease.acquire(keys, num_tokens, reuse=num_tokens)
            row.token_ids = token_ids[: lease.num_tokens].tolist()

    def forward(self, work: Sequence[NewTokens], out: Logits) -> None:
        """Put new tokens into the rows' caches.

        Args:
            work: no row occurs twice.
            out: float32 (sum of num_wanted, V), gets the logits, in the order of the work.

        Raises:
            ValueError, MemoryError: there is no memory for the blocks; nothing has changed then.
        """
        before = [len(new.row.token_ids) for new in work]
        with self._between_steps() as pause:
            leases = [_lease_of(new.row, pause) for new in work]
            try:
                _extend(pause, leases, work)
                self._compute(pause, work, out)
            except BaseException:
                for new, lease, count in zip(work, leases, before, strict=True):
                    del new.row.token_ids[count:]
                    lease.rewind(lease.num_tokens - count)
                raise
            for new, lease in zip(work, leases, strict=True):
                if new.row.plain:
                    lease.register(lease.num_tokens, new.row.token_ids)

    def _compute(self, pause: Pause, work: Sequence[NewTokens], out: Logits) -> None:
        at = 0
        for pieces in self._steps(work):
            count = sum(piece.num_wanted for piece in pieces)
            logits = pause.forward(_batch(pieces))
            out[at : at + count] = logits.cpu() if hasattr(logits, "cpu") else logits
            at += count
            for new, start, end in pieces:
                new.row.token_ids += new.token_ids[start:end].tolist()

    @contextmanager
    def _between_steps(self) -> Iterator[Pause]:
        with deferred_interrupts(), self.engine.between_steps() as pause:
            while self._cuts:
                lease, num_tokens = self._cuts.popleft()
                lease.rewind(lease.num_tokens - num_tokens)
            yield pause

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


def _lease_of(row: KvRow, pause: Pause) -> Lease:
    if row.lease is None:
        row.lease = pause.lease()
    return row.lease


def _extend(pause: Pause, leases: Sequence[Lease], work: Sequence[NewTokens]) -> None:
    """Blocks for the new tokens; a partly filled one that others hold is copied first."""
    pause.reserve_blocks(sum(blocks_for(len(new.token_ids)) + 1 for new in work))
    copies: list[tuple[int, int]] = []
    try:
        for lease, new in zip(leases, work, strict=True):
            copies += lease.extend(len(new.token_ids))
    finally:
        pause.copy_blocks(copies)


def _batch(pieces: Sequence[_Piece]) -> StepBatch:
    blocks = [new.row.lease.blocks if new.row.lease else [] for new, _, _ in pieces]
    tables = np.zeros((len(pieces), max(map(len, blocks))), np.int32)
    for table, own in zip(tables, blocks, strict=True):
        table[: len(own)] = own
    ends = np.cumsum([end - start for _, start, end in pieces])
    wanted = [np.arange(at - p.num_wanted, at) for p, at in zip(pieces, ends, strict=True)]
    return StepBatch.ragged(
        token_ids=np.concatenate([new.token_ids[start:end] for new, start, end in pieces]),
        counts=[end - start for _, start, end in pieces],
        positions=np.concatenate([new.positions[start:end] for new, start, end in pieces]),
        cache_lens=[len(new.row.token_ids) for new, _, _ in pieces],
        block_tables=tables,
        logits_at=np.concatenate(wanted),
        seats=np.full(sum(map(len, wanted)), -1),
    )


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
