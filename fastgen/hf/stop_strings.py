"""transformers' StopStringCriteria for one row, token by token.

It reads the same table (`embedding_vec`, made by transformers from the vocabulary): of a token, the
places inside each stop string where it can stand, how much of the string's end it can hold, and its
length. So it ends a row at the same token, stop strings that begin in the prompt included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from transformers.generation.stopping_criteria import StopStringCriteria


class StopStringSink:
    """A row's sink: `push` says whether a stop string ends with this token."""

    stop_reason: str | None = None

    def __init__(self, criterion: StopStringCriteria, prompt: Sequence[int]) -> None:
        self._criterion = criterion
        self._table = criterion.embedding_vec.cpu().numpy()
        self._tail = deque(prompt, maxlen=criterion.maximum_token_len)

    def push(self, token_id: int) -> bool:
        self._tail.append(token_id)
        for index, text in enumerate(self._criterion.stop_strings):
            if self._ends_with(index):
                self.stop_reason = text
                return True
        return False

    def finish(self) -> None:
        """There is no text to be completed."""

    def _ends_with(self, index: int) -> bool:
        positions_of, ends_of, target = self._columns(index)
        tokens = [self._table[min(token_id, len(self._table) - 1)] for token_id in self._tail]
        last, before = tokens[-1], tokens[-2::-1]
        for matched in last[ends_of][last[ends_of] > 0].tolist():
            for token in before:
                if matched >= target or matched not in token[positions_of]:
                    break
                matched += int(token[-1])
            if matched >= target:
                return True
        return False

    def _columns(self, index: int) -> tuple[slice, slice, int]:
        """Of one stop string: where its places stand in a table row, where its ends, its length."""
        criterion = self._criterion
        places, ends = criterion.max_valid_positions, criterion.max_valid_end_lens
        behind = places * criterion.num_stop_strings
        return (
            slice(places * index, places * (index + 1)),
            slice(behind + ends * index, behind + ends * (index + 1)),
            int(criterion.target_lens[index]),
        )
