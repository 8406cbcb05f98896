"""What a drafter is: it guesses which tokens follow in a row.

The engine appends the guesses to the row's last token in the next step, and keeps the draws up to
and including the first that differs from its guess. So a draft, whatever is in it, changes how many
tokens a step gives, and never which.

The engine calls a drafter on the thread of its step, and nowhere else.
"""

from __future__ import annotations

import logging
import operator
import traceback
from collections.abc import Callable, Sequence
from itertools import islice
from typing import ClassVar, NamedTuple, Protocol

from fastgen.sampling.params import SamplingParams

MAX_LEVEL = 15
_Reason = tuple[type[Exception], str, int]  # exception, file, line

logger = logging.getLogger("fastgen")


class DraftRow(Protocol):
    """What a drafter sees of a row; the engine's Row is one. It is hashed by identity.

    Attributes:
        token_ids: the prompt and what was drawn; read only; it only grows.
        prompt_len: how many of them are the prompt's.
        max_len: the row ends when it has this many tokens.
        params: its options, with its own seed.
        cache_salt: rows with other salts must not learn anything of this one.
    """

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def cache_salt(self) -> str | None: ...


class Draft(NamedTuple):
    """The tokens that may follow in a row.

    Attributes:
        ids: at most as many as were asked for; may be empty.
        level: 0 to MAX_LEVEL; drafts of one level are accepted about equally often, so that the
            engine can measure how often, for each level.
    """

    ids: Sequence[int]
    level: int = 0


class Drafter(Protocol):
    """Guesses for all rows of a step.

    Attributes:
        is_free: a guess takes next to no time. Others are asked for no more than is worth its time.
        reads_rows: it reads a row's tokens before its first guess, which takes longer than others.
        survives_fork: it can be used in a forked child.
    """

    @property
    def is_free(self) -> bool: ...
    @property
    def reads_rows(self) -> bool: ...
    @property
    def survives_fork(self) -> bool: ...

    def warmup(self) -> None:
        """Do once, at a chosen time, what the first guess would otherwise have to do."""
        ...

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> Sequence[Draft]:
        """A draft for each row, in order, of at most most[i] tokens; most[i] >= 1."""
        ...

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        """The first ids of the row's last draft, as far as they were drawn; called after each step
        in which the row had a draft."""
        ...

    def ended(self, row: DraftRow) -> None:
        """The row gets no more tokens: forget it. Also called for rows never proposed for."""
        ...

    def close(self) -> None:
        """Nothing is asked any more: give back what it holds."""
        ...


class FunctionDrafter:
    """The caller's function as a drafter.

    Args:
        function: called with the ids of a row so far, a tuple, and the number of ids wanted;
            returns the ids that may follow, of which those too many are left out. If it raises an
            Exception, or returns anything but integers, the row gets no more drafts. That is
            logged once for each kind of exception and line of code that raises it.
    """

    is_free: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    survives_fork: ClassVar[bool] = True

    def __init__(self, function: Callable[[Sequence[int], int], Sequence[int]]) -> None:
        self._function = function
        self._failed: set[DraftRow] = set()
        self._logged: set[_Reason] = set()

    def warmup(self) -> None:
        """Nothing to do: what the function needs is its own business."""

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        return [self._draft(row, count) for row, count in zip(rows, most, strict=True)]

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        """Nothing to learn: the function sees the ids."""

    def ended(self, row: DraftRow) -> None:
        self._failed.discard(row)

    def close(self) -> None:
        self._failed.clear()

    def _draft(self, row: DraftRow, most: int) -> Draft:
        if row in self._failed:
            return Draft(())
        try:
            ids = self._function(tuple(row.token_ids), most)
            return Draft([operator.index(token_id) for token_id in islice(ids, most)])
        except Exception as error:
            self._failed.add(row)
            self._log_once(error)
            return Draft(())

    def _log_once(self, error: Exception) -> None:
        reason = _reason(error)
        if reason not in self._logged:
            self._logged.add(reason)
            logger.error(
                "the function that drafts tokens failed; rows that it fails with go on without "
                "drafts",
                exc_info=error,
            )


def _reason(error: Exception) -> _Reason:
    """What was raised, and where: messages may differ from row to row."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return type(error), frame.f_code.co_filename, line
