"""Leases of KV blocks: the only way to hold any.

A lease holds the blocks of one sequence: of a row of the engine, or of a sequence that a caller
computes between the engine's steps. It begins with whatever the cache has of the sequence, grows,
shrinks when tokens are taken back, and can be shared. Its holder never writes into a block that
somebody else holds: such a block is replaced first by one of the lease's own (copy on write). A
block's content key is dropped before the block is overwritten. The caller makes the copies that
`acquire` and `extend` return before the next step writes.

After an exception in `acquire` a lease holds nothing; after one in `extend`, what it held before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import BlockPool, Key, next_key

Copies = Sequence[tuple[int, int]]  # (source, destination) blocks


@dataclass(frozen=True, slots=True)
class Acquired:
    """The lease has its blocks; `copies` have to be made before they are written."""

    copies: Copies


@dataclass(frozen=True, slots=True)
class PrefixPending:
    """The lease has nothing: another holder is just computing more of the beginning, in `block`."""

    block: int


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The lease has nothing: too few blocks are free."""


class Lease:
    """The KV blocks of one sequence. One thread at a time, within a step or between two.

    Attributes:
        blocks: block numbers; blocks[i] is for the tokens from BLOCK_SIZE * i on. Read only.
        num_tokens: tokens in the blocks, counting those that a step already started will write.
        num_shared: of the blocks, the first that were found when they were acquired, or shared.
        register_at: `register` has something to do when so many tokens have been computed.
    """

    __slots__ = (
        *("blocks", "num_tokens", "num_shared", "register_at"),
        *("_pool", "_cache_salt", "_keys", "_num_registered", "_tail_key", "_tail_end"),
        *("_num_reserved", "_may_write"),
    )

    def __init__(self, pool: BlockPool, cache_salt: str | None = None) -> None:
        self._pool, self._cache_salt = pool, cache_salt
        self._clear()

    def _clear(self) -> None:
        self.blocks: list[int] = []
        self.num_tokens = self.num_shared = 0
        self._keys: list[Key] = []  # of full blocks, as far as known
        self._num_registered = 0  # of the keys, those that this lease has registered or found
        self._tail_key: Key | None = None  # of the partly filled block that ends at _tail_end,
        self._tail_end = 0  # until it is registered
        self._num_reserved = 0  # blocks that `rewind` never frees
        self._may_write = True  # no one else holds or finds the blocks from num_tokens on
        self.register_at = BLOCK_SIZE

    def acquire(
        self,
        keys: Sequence[Key],
        num_tokens: int,
        *,
        reuse: int | None,
        announce: int = 0,
        num_blocks: int = 0,
        wait: bool = False,
    ) -> Acquired | PrefixPending | NoRoom:
        """Take the blocks of a sequence that begins with known tokens, as far as the cache has
        them, and new ones up to `num_blocks`.

        Args:
            keys: content keys of the blocks of the first `num_tokens` tokens; the last block may be
                partly filled.
            reuse: at most so many tokens are taken over from the cache; None looks nothing up.
            announce: the holder computes the tokens before this one at once: others who look for
                the same content may wait for it.
            num_blocks: blocks reserved until the lease is released; `rewind` never frees them.
            wait: take nothing while another holder computes a part of the beginning.

        Raises:
            Whatever hashing or the pool raises: the lease has nothing then.
        """
        assert not self.blocks, "it has been acquired"
        found: list[int] = []
        for key in () if reuse is None else keys:
            pending = self._pool.pending(key) if wait else None
            if pending is not None:
                return PrefixPending(pending)
            block = self._pool.find(key)
            if block is None:
                break
            found.append(block)
        try:
            copies = self._take(found, reuse or 0, num_blocks)
            if copies is None:
                self.release()
                return NoRoom()
            self._announce(keys, num_tokens, announce)
        except BaseException:
            self.release()
            raise
        return Acquired(copies)

    def extend(self, count: int) -> Copies:
        """Make room for `count` more tokens after the present ones, and count them as present.

        Returns:
            the copies to be made before the tokens are written.

        Raises:
            EngineError: too few blocks are free; the lease has what it had.
        """
        end = self.num_tokens + count
        if self._may_write and end <= BLOCK_SIZE * len(self.blocks):
            self.num_tokens = end
            return ()
        replaced = [] if self._may_write else self._unwritable()
        num_new = len(replaced) + max(0, blocks_for(end) - len(self.blocks))
        fresh = self._pool.allocate(num_new) if num_new else []
        if replaced:  # what was announced in them will not come there
            self._pool.forget_pending(self._announced(replaced[0]), self.blocks)
        copies: list[tuple[int, int]] = []
        for index, block in zip(replaced, fresh, strict=False):
            if index * BLOCK_SIZE < self.num_tokens:
                copies.append((self.blocks[index], block))
            self._pool.release([self.blocks[index]])
            self.blocks[index] = block
        self.blocks += fresh[len(replaced) :]
        if not self._may_write:  # what could be found there will be overwritten
            self._pool.forget(self.blocks[self.num_tokens // BLOCK_SIZE :])
            self._may_write = True
        self.num_tokens = end
        return copies

    def register(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """So many tokens have been computed, and stay: let others find them.

        Args:
            token_ids: the sequence, at least these tokens; they stand at positions 0, 1, 2, ...
        """
        for index in range(self._num_registered, num_tokens // BLOCK_SIZE):
            if index == len(self._keys):
                self._keys.append(next_key(self._keys, token_ids, self._cache_salt))
            self._pool.register(self._keys[index], self.blocks[index])
            self._num_registered = index + 1
        if self._tail_key is not None and num_tokens >= self._tail_end:
            self._pool.register(self._tail_key, self.blocks[self._tail_end // BLOCK_SIZE])
            self._tail_key = None
        self._set_register_at()

    def rewind(self, count: int) -> None:
        """Take the last `count` tokens back; blocks that are neither needed nor reserved go.

        What remains stays findable, and so does what was taken back, until it is overwritten; what
        was announced and is now taken back does not.
        """
        kept = self.num_tokens - count
        assert 0 <= kept <= self.num_tokens, "more is taken back than there is"
        num_full = kept // BLOCK_SIZE
        self._withdraw(num_full, kept)
        del self._keys[num_full:]
        self._num_registered = min(self._num_registered, num_full)
        self.num_shared = min(self.num_shared, num_full)
        num_blocks = max(blocks_for(kept), self._num_reserved)
        self._pool.release(self.blocks[num_blocks:])
        del self.blocks[num_blocks:]
        self.num_tokens, self._may_write = kept, False
        self._set_register_at()

    def retract(self, count: int) -> None:
        """Uncount the last `count` tokens of those that `extend` has counted and nobody registered:
        drafts that were wrong. Blocks and what is findable stay; the tokens' places are written
        again.
        """
        self.num_tokens -= count
        assert self.num_tokens >= BLOCK_SIZE * self._num_registered, "they have been registered"

    def share(self) -> Lease:
        """Another lease on the same tokens, in the same blocks, until either of them writes."""
        twin = Lease(self._pool, self._cache_salt)
        blocks = self.blocks[: blocks_for(self.num_tokens)]
        self._pool.share(blocks)
        twin.blocks, twin.num_tokens = blocks, self.num_tokens
        twin.num_shared = self.num_tokens // BLOCK_SIZE
        twin._keys, twin._num_registered = self._keys[: self._num_registered], self._num_registered
        twin._set_register_at()
        self._may_write = twin._may_write = False
        return twin

    def forget(self) -> None:
        """What the holder has written may be NaN: let nobody find it."""
        self._pool.forget(self.blocks[self.num_shared :])

    def release(self) -> None:
        """Give everything back, and withdraw what was announced; harmless the second time."""
        self._withdraw(0, 0)
        self._pool.release(self.blocks)
        self._clear()

    def _take(self, found: list[int], reuse: int, num_blocks: int) -> Copies | None:
        """Share what was found and allocate the rest; None if too few are free.

        Returns the copy, if any, that puts a found, partly used block into the lease's own.
        """
        pool = self._pool
        num_reused = min(len(found) * BLOCK_SIZE, reuse)
        num_shared = num_reused // BLOCK_SIZE
        shared, tail = found[:num_shared], found[num_shared:]  # a tail: found, and written again
        num_new = max(num_blocks, blocks_for(num_reused)) - num_shared
        pool.share(found)
        self.blocks = found  # at any moment what it has, to be given back
        if tail and num_new > pool.num_free:  # no room for it and its copy
            self.blocks, num_reused = shared, num_shared * BLOCK_SIZE
            pool.release(tail)
            tail, num_new = [], max(num_blocks, num_shared) - num_shared
        if num_new > pool.num_free:
            return None
        self.blocks = shared + pool.allocate(num_new)
        pool.release(tail)  # nobody writes there before it is copied
        self.num_tokens, self.num_shared = num_reused, num_shared
        self._num_reserved = num_blocks
        return [(tail[0], self.blocks[num_shared])] if num_reused % BLOCK_SIZE else []

    def _announce(self, keys: Sequence[Key], num_tokens: int, end: int) -> None:
        """Register, as pending, the keys of the blocks that are filled before token `end`.

        Of the others nothing is kept: what comes there may be other tokens.
        """
        num_full = max(self.num_shared, min(num_tokens, end) // BLOCK_SIZE)
        self._keys, self._num_registered = list(keys[:num_full]), self.num_shared
        if num_tokens % BLOCK_SIZE and num_tokens <= end:
            self._tail_key, self._tail_end = keys[-1], num_tokens
        self._set_register_at()
        for index, key in enumerate(self._keys):
            if self.num_tokens < (index + 1) * BLOCK_SIZE:
                self._pool.register(key, self.blocks[index], pending=True)
        if self._tail_key is not None and self.num_tokens < self._tail_end:
            block = self.blocks[self._tail_end // BLOCK_SIZE]
            self._pool.register(self._tail_key, block, pending=True)

    def _withdraw(self, num_full: int, num_tokens: int) -> None:
        """Withdraw what was announced beyond so many full blocks and tokens."""
        tail_goes = self._tail_key is not None and num_tokens < self._tail_end
        announced = self._announced(num_full) if tail_goes else self._keys[num_full:]
        self._pool.forget_pending(announced, self.blocks)
        if tail_goes:
            self._tail_key = None

    def _announced(self, first: int) -> list[Key]:
        """Keys of the blocks from the `first` on, and of the partly filled one if it is to come."""
        full = self._keys[first:]
        return full if self._tail_key is None else [*full, self._tail_key]

    def _unwritable(self) -> list[int]:
        """Of the blocks that are still to be written, those that others hold (indices)."""
        first = self.num_tokens // BLOCK_SIZE
        return [
            index
            for index, block in enumerate(self.blocks[first:], first)
            if self._pool.ref_count(block) > 1
        ]

    def _set_register_at(self) -> None:
        full = (self._num_registered + 1) * BLOCK_SIZE
        self.register_at = full if self._tail_key is None else min(full, self._tail_end)
