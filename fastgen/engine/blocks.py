"""The books of KV memory: free list, reference counts, and look-up by content.

A block holds the keys and values of 32 consecutive tokens of a row, in every layer. Blocks here are
only numbers; the decoder owns the memory. Rows that begin with the same tokens share blocks. Only
leases (leases.py) take blocks, share them and give them back.

Content is known by a chain of SHA-256 hashes: a block's key covers its tokens, their positions and
everything before it, so equal keys mean equal keys and values. A block stays findable after its
last owner has gone, until its memory is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.errors import EngineError, OutOfBlocksError

Key = bytes


def block_keys(token_ids: Sequence[int], cache_salt: str | None = None) -> list[Key]:
    """One key a block of a row that starts at position 0; the last block may be partly filled."""
    keys: list[Key] = []
    key = root_key(cache_salt)
    for start in range(0, len(token_ids), BLOCK_SIZE):
        key = chain_key(key, token_ids[start : start + BLOCK_SIZE], start)
        keys.append(key)
    return keys


def root_key(cache_salt: str | None) -> Key:
    """The parent of a row's first block; rows with different salts never share a block."""
    return hashlib.sha256(b"fastgen" + (cache_salt or "").encode()).digest()


def chain_key(parent: Key, token_ids: Sequence[int], start: int) -> Key:
    """The key of the block after `parent`, with these tokens at positions start, start + 1, ..."""
    content = np.array([start, *token_ids], dtype="<i8").tobytes()
    return hashlib.sha256(parent + content).digest()


def next_key(keys: Sequence[Key], token_ids: Sequence[int], cache_salt: str | None) -> Key:
    """The key of a row's next block after those with `keys`; the row has filled it."""
    start = len(keys) * BLOCK_SIZE
    parent = keys[-1] if keys else root_key(cache_salt)
    return chain_key(parent, token_ids[start : start + BLOCK_SIZE], start)


def blocks_needed(max_len: int) -> int:
    """All that a row of at most `max_len` tokens can ever need: its last token is never fed."""
    return blocks_for(max_len - 1)


class BlockPool:
    """Every block of one decoder: each is free, or owned by one lease or several.

    Free blocks are reused in the order in which they became free, so that blocks that were one
    row's become one row's again, and neighbours stay neighbours.
    """

    def __init__(self, num_blocks: int) -> None:
        self._ref_counts = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # what they hold stays findable
        self._block_by_key: dict[Key, int] = {}
        self._keys_by_block: dict[int, list[Key]] = {}
        self._pending: set[Key] = set()  # keys of blocks that are still being filled

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def grow(self, num_blocks: int) -> None:
        """Have at least so many blocks; those that are new are free."""
        for block in range(self.num_blocks, num_blocks):
            self._ref_counts.append(0)
            self._free[block] = None

    def find(self, key: Key) -> int | None:
        """The block with this content, if there is one and it is filled."""
        return None if key in self._pending else self._block_by_key.get(key)

    def pending(self, key: Key) -> int | None:
        """The block that a row is just filling with this content, if there is one."""
        return self._block_by_key[key] if key in self._pending else None

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each block; a free one is taken out of the free list."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for one owner; what they held is forgotten.

        Raises:
            OutOfBlocksError: fewer are free; nothing is taken then.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} KV blocks wanted, {self.num_free} are free")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return sorted(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block of a row, given in the row's order.

        The row's last block is freed first, so that the beginnings, which more rows can share, are
        reused last.
        """
        for block in reversed(blocks):
            if self._ref_counts[block] <= 0:
                raise EngineError(f"KV block {block} is released more often than taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None

    def register(self, key: Key, block: int, *, pending: bool = False) -> None:
        """Make an owned block findable by its content; the first block with a key keeps it."""
        if key in self._block_by_key:
            if not pending and self._block_by_key[key] == block:
                self._pending.discard(key)
            return
        self._block_by_key[key] = block
        self._keys_by_block.setdefault(block, []).append(key)
        if pending:
            self._pending.add(key)

    def forget_pending(self, keys: Iterable[Key], blocks: Sequence[int]) -> None:
        """Drop keys that a row announced for its `blocks` but will not fill."""
        for key in keys:
            block = self._block_by_key.get(key)
            if key in self._pending and block in blocks:
                self._drop_key(key)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find what these blocks hold."""
        for block in blocks:
            self._forget(block)

    def check(self) -> None:
        """Raise AssertionError if the books do not balance (for tests and debugging)."""
        assert set(self._free) == {b for b, count in enumerate(self._ref_counts) if count == 0}
        assert all(count >= 0 for count in self._ref_counts)
        pairs = {(key, b) for b, keys in self._keys_by_block.items() for key in keys}
        assert pairs == set(self._block_by_key.items())
        assert self._pending <= set(self._block_by_key)

    def _forget(self, block: int) -> None:
        for key in self._keys_by_block.pop(block, ()):
            del self._block_by_key[key]
            self._pending.discard(key)

    def _drop_key(self, key: Key) -> None:
        block = self._block_by_key.pop(key)
        self._pending.discard(key)
        self._keys_by_block[block].remove(key)
        if not self._keys_by_block[block]:
            del self._keys_by_block[block]
