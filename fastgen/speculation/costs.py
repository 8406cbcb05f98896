"""What a step costs, by its number of tokens: measured at warm-up, and by every step that runs."""

from __future__ import annotations

from collections.abc import Callable

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # tokens of the steps that are measured
_MOST = 256  # larger steps are not told apart
_PRIOR = 0.05  # of a step's time for each token more, as long as nothing is known
_RISE = 1.01  # times itself that a cost becomes at most with a new time


class StepCosts:
    """Seconds of a decode step with n tokens: the least that was measured lately.

    Whatever else the machine does only makes a step longer. So a cost falls at once, and rises
    slowly.
    """

    def __init__(self) -> None:
        self._seconds = [0.0] * (_MOST + 1)
        self._known: list[int] = []  # the sizes that have been measured, in order
        self._table: list[float] | None = None  # of all sizes, until something is measured

    @property
    def is_measured(self) -> bool:
        """Whether there is any time yet."""
        return bool(self._known)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step with so many tokens took so long."""
        if not 0 < num_tokens <= _MOST or seconds <= 0:
            return
        if self._seconds[num_tokens]:
            self._seconds[num_tokens] = min(seconds, _RISE * self._seconds[num_tokens])
        else:
            self._seconds[num_tokens] = seconds
            self._known = sorted([*self._known, num_tokens])
        self._table = None

    def measure(self, step: Callable[[int], float], most: int) -> None:
        """Fill the table.

        Args:
            step: makes a step with so many tokens, and returns the seconds it took.
            most: tokens that a step may have.
        """
        for size in SIZES:
            for _ in range(3 if size <= most else 0):
                self.observe(size, step(size))

    def seconds(self, num_tokens: int) -> float:
        """Of a step with so many tokens; 0 if nothing is known. Never less than with fewer."""
        if self._table is None:
            self._table = self._interpolated()
        return self._table[min(num_tokens, _MOST)]

    def _interpolated(self) -> list[float]:
        """Between two measured sizes a line; beyond them, the prior's share for each token."""
        table = [0.0] * (_MOST + 1)
        if not self._known:
            return table
        first = self._known[0]
        base = self._seconds[first] / (1 + _PRIOR * (first - 1))  # of one token
        for at in range(first):
            table[at] = base * (1 + _PRIOR * (at - 1))
        for low, high in zip(self._known, [*self._known[1:], _MOST + 1], strict=True):
            start = self._seconds[low]
            slope = _PRIOR * base if high > _MOST else (self._seconds[high] - start) / (high - low)
            for at in range(low, high):
                table[at] = start + slope * (at - low)
        for at in range(1, _MOST + 1):
            table[at] = max(table[at], table[at - 1])
        return table
