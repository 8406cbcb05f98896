"""transformers' StopStringCriteria for one row, token by token.

It reads the same table (`embedding_vec`, made by transformers from the vocabulary): of a token, the
places inside each stop string where it can stand, how much of the string's end it can hold, and its
length. So it ends a row at the same token, stop strings that begin in the prompt included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.generation.stopping_criteria import StopStringCriteria


class StopStringSink:
    """A row's sink: `push` says whether a stop string ends with this token."""

    stop_reason: str | None = None

    def __init__(self, criterion: StopStringCriteria, prompt: Sequence[int]) -> None:
        self._table = criterion.embedding_vec.cpu().numpy()
        self._tail = deque(prompt, maxlen=criterion.maximum_token_len)
        columns = [_columns(criterion, index) for index in range(criterion.num_stop_strings)]
        self._stops = list(zip(criterion.stop_strings, columns, strict=True))

    def push(self, token_id: int) -> bool:
        self._tail.append(token_id)
        for text, columns in self._stops:
            if self._ends_with(*columns):
                self.stop_reason = text
                return True
        return False

    def finish(self) -> None:
        """There is no text to be completed."""

    def _ends_with(self, places_of: slice, ends_of: slice, target: int) -> bool:
        ends = self._entry(self._tail[-1])[ends_of]
        for matched in ends[ends > 0].tolist():  # nearly always none
            for token_id in reversed(list(self._tail)[:-1]):
                entry = self._entry(token_id)
                if matched >= target or matched not in entry[places_of]:
                    break
                matched += int(entry[-1])
            if matched >= target:
                return True
        return False

    def _entry(self, token_id: int) -> Any:
        """A token's row of the table; the last stands for those that the vocabulary has not."""
        return self._table[min(token_id, len(self._table) - 1)]


def _columns(criterion: StopStringCriteria, index: int) -> tuple[slice, slice, int]:
    """Of one stop string: where its places stand in a table row, where its ends, its length."""
    places, ends = criterion.max_valid_positions, criterion.max_valid_end_lens
    first_end = places * criterion.num_stop_strings
    return (
        slice(places * index, places * (index + 1)),
        slice(first_end + ends * index, first_end + ends * (index + 1)),
        int(criterion.target_lens[index]),
    )
