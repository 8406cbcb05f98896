"""The drafter that needs no model: what came after earlier occurrences of a row's last tokens.

They are looked for in the row itself, prompt and output, by a suffix automaton of its own, and in a
store of earlier rows' outputs that all rows share. The longer match gives the draft. Both are C++
(csrc/speculation), or suffix_automaton's where the extension is missing; the drafts are the same.

Memory: of a row that runs 108 bytes a token, for the next power of two of tokens: 0.11 MB for 1024.
A row of more than 4096 (0.44 MB) is known from its last 2048 to 4096 tokens. The store takes
4 MiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

from fastgen.native import native
from fastgen.speculation import suffix_automaton
from fastgen.speculation.drafter import Draft, DraftRow

STORE_TOKENS = 2**18  # 16 bytes each
_ROW_BYTES = 162  # of a row's token while it grows: half as many more
CONTEXT_TOKENS = 16  # of the prompt, which are stored before an output


class SuffixDrafter:
    """Drafts from a row's own tokens and from outputs of earlier rows with the same cache_salt.

    Args:
        store_tokens: how many tokens of earlier outputs are kept; a power of two, at least 64.
    """

    is_free: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = False
    survives_fork: ClassVar[bool] = True

    def __init__(self, store_tokens: int = STORE_TOKENS) -> None:
        self._parts: Any = suffix_automaton if native is None else native
        self._store = self._parts.OutputStore(store_tokens)
        self._rows: dict[DraftRow, Any] = {}

    def warmup(self) -> None:
        """Nothing to do."""

    @staticmethod
    def planned_bytes(num_rows: int, max_len: int) -> int:
        """The most that is kept of so many rows of `max_len` tokens, and in the store."""
        known = 1 << (min(max_len, suffix_automaton.MAX_TOKENS) - 1).bit_length()
        return 16 * STORE_TOKENS + _ROW_BYTES * num_rows * known

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        """A draft for each row, whose level tells the length of the match, and whether what
        followed it was more often right or wrong."""
        return [self._propose(row, count) for row, count in zip(rows, most, strict=True)]

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        """Nothing to learn: the row's tokens tell what was right."""

    def ended(self, row: DraftRow) -> None:
        """Forget the row, and keep its output, with the last tokens of its prompt, for others."""
        self._rows.pop(row, None)
        if len(row.token_ids) > row.prompt_len:
            start = max(0, row.prompt_len - CONTEXT_TOKENS)
            self._store.add(_digest(row.cache_salt), row.token_ids, start)

    def close(self) -> None:
        """Forget all rows and outputs."""
        self._rows.clear()
        self._store = self._parts.OutputStore(suffix_automaton.MIN_CAPACITY)

    def _propose(self, row: DraftRow, most: int) -> Draft:
        found = self._rows.get(row)
        if found is None:
            found = self._parts.SuffixRow(self._store, _digest(row.cache_salt))
            self._rows[row] = found
        return Draft._make(found.propose(row.token_ids, most))


def _digest(cache_salt: str | None) -> bytes:
    """32 bytes; rows with different salts never learn from each other."""
    return hashlib.sha256(b"fastgen" + (cache_salt or "").encode()).digest()
