"""How often drafts are right: of one row, and of all rows before it."""

from __future__ import annotations

from fastgen.speculation.drafter import MAX_LEVEL

_PRIOR = 0.4  # as long as nothing is known
_PRIOR_WEIGHT = 2.0  # tokens' worth of evidence
_SHARED_WEIGHT = 2.0  # of all rows', in one row's estimate
_MOST_TRUSTED = 0.5  # of all rows' share: another text may be nothing like theirs
_SHARED_MEMORY = 1 / 512  # the share of the evidence that each new token replaces
_ROW_MEMORY = 1 / 24
_HIGHEST = 0.995


class Acceptance:
    """The share of drafted tokens that were right, given that those before them were; a level each.

    Evidence fades: a text that begins to repeat itself is believed soon. `shared` is what a new
    row starts with, if that is not too good.
    """

    __slots__ = ("_memory", "_right", "_shared", "_tried")

    def __init__(self, shared: Acceptance | None = None) -> None:
        self._shared = shared
        self._memory = _SHARED_MEMORY if shared is None else _ROW_MEMORY
        self._right = [0.0] * (MAX_LEVEL + 1)
        self._tried = [0.0] * (MAX_LEVEL + 1)

    def share(self, level: int) -> float:
        """The probability, below 1, that the next drafted token of this level is right."""
        if self._shared is None:
            prior, weight = _PRIOR, _PRIOR_WEIGHT
        else:
            prior, weight = min(self._shared.share(level), _MOST_TRUSTED), _SHARED_WEIGHT
        share = (self._right[level] + weight * prior) / (self._tried[level] + weight)
        return min(share, _HIGHEST)

    def note(self, level: int, num_drafted: int, num_accepted: int) -> None:
        """Of a draft with so many tokens, so many from the first on were right."""
        tried = num_accepted + (num_accepted < num_drafted)
        kept = (1 - self._memory) ** tried
        self._right[level] = self._right[level] * kept + num_accepted
        self._tried[level] = self._tried[level] * kept + tried
        if self._shared is not None:
            self._shared.note(level, num_drafted, num_accepted)
