"""What a step costs, by its number of tokens: measured at warm-up, and by every step that runs.
What a drafter's answer costs, by how much it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # tokens of the steps that are measured
_MOST = 256  # larger steps are not told apart
_PRIOR = 0.05  # of one token's step for each token more, as long as nothing was measured
_SMOOTHING = 0.1  # the weight of a new time, once several are known
_OUTLIER = 2.0  # times what was expected that a new time counts for at most
_FACTORS = (0.25, 8.0)
_ASK_OUTLIER = 8.0  # as _OUTLIER, of a drafter's answer: these differ more than steps do
_ORIGIN = 0.3  # the weight of "no tokens take no time" among a drafter's answers


class StepCosts:
    """Seconds of a step with n rows, and of drafted tokens that it takes besides.

    What rows cost grows with their contexts, and is followed by the time of each step. What further
    tokens of the same rows cost depends on the tiles of the products: a table of whole steps,
    measured by `measure`, says how it grows, and a factor how much of that is seen.
    """

    def __init__(self) -> None:
        self._table: list[float] = []  # of a step with n tokens of one row; empty: not measured
        self._seconds: dict[int, float] = {}  # by rows, without drafts
        self._factor = 1.0

    @property
    def is_measured(self) -> bool:
        """Whether there is any time yet."""
        return bool(self._table or self._seconds)

    def measure(self, step: Callable[[int], float], most: int) -> None:
        """Fill the table.

        Args:
            step: makes a step with so many tokens of one row, and returns the seconds it took.
            most: tokens that a step may have.
        """
        found = {size: min(step(size) for _ in range(3)) for size in SIZES if size <= most}
        if min(found.values(), default=0) > 0:
            self._table = _interpolated(found)
            self._factor = 1.0

    def observe(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """A step with a token for each of so many rows, and so many drafted ones, took so long."""
        if num_rows < 1 or seconds <= 0:
            return
        if num_rows not in self._seconds:
            self._seconds[num_rows] = max(seconds - self._extra(num_rows, num_drafted), seconds / 4)
            return
        # Normalized least mean squares (Widrow and Hoff), of the rows' time and of the factor.
        expected = self.seconds(num_rows, num_drafted)
        shape = self._shape(num_rows)
        share = (self._shape(num_rows + num_drafted) - shape) / shape
        seconds = min(seconds, _OUTLIER * expected)
        step = _SMOOTHING * (seconds - expected) / (1 + share**2)
        self._seconds[num_rows] = max(self._seconds[num_rows] + step, seconds / 4)
        factor = self._factor + step * share / shape
        self._factor = min(max(factor, _FACTORS[0]), _FACTORS[1])

    def seconds(self, num_rows: int, num_drafted: int = 0) -> float:
        """Of a step with so many rows and drafted tokens; 0 if nothing is known."""
        return self._rows(num_rows) + self._extra(num_rows, num_drafted)

    def _rows(self, num_rows: int) -> float:
        known = self._seconds.get(num_rows)
        if known is not None or not self.is_measured:
            return known or 0.0
        if not self._seconds:
            return self._table[min(num_rows, _MOST)]
        nearest = min(self._seconds, key=lambda rows: abs(rows - num_rows))
        return self._seconds[nearest] * self._shape(num_rows) / self._shape(nearest)

    def _extra(self, num_rows: int, num_drafted: int) -> float:
        return self._factor * (self._shape(num_rows + num_drafted) - self._shape(num_rows))

    def _shape(self, num_tokens: int) -> float:
        """Of a step with so many tokens, as the table or the prior has it."""
        if self._table:
            return self._table[min(num_tokens, _MOST)]
        if not self._seconds:
            return 0.0
        rows, seconds = next(iter(self._seconds.items()))
        return seconds * (1 + _PRIOR * (num_tokens - 1)) / (1 + _PRIOR * (rows - 1))


class AskCosts:
    """Seconds of a drafter's answer for all rows that it is asked for at a time, by the number of
    tokens wanted for each: a part of every answer, and one of each token.

    They are a line through recent answers, by least squares. As long as all were of one length, the
    whole time counts as the tokens'.
    """

    def __init__(self) -> None:
        # Weighted sums: of answers, tokens, tokens squared, seconds, tokens x seconds.
        self._sums: tuple[float, ...] = (0.0,) * 5

    @property
    def is_measured(self) -> bool:
        """Whether there is any time yet."""
        return self._sums[0] > 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """An answer with so many tokens for each row, at least one, took so long."""
        if self.is_measured:
            seconds = min(seconds, _ASK_OUTLIER * self.seconds(num_tokens))
        new = (1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        self._sums = tuple(
            (1 - _SMOOTHING) * known + one for known, one in zip(self._sums, new, strict=True)
        )

    def seconds(self, num_tokens: int) -> float:
        """Of an answer with so many tokens for each row; 0 if nothing is known."""
        weight, tokens, squares, total, products = self._sums
        if not weight:
            return 0.0
        weight += _ORIGIN
        slope = (weight * products - tokens * total) / (weight * squares - tokens**2)
        slope = min(max(slope, 0.0), total / tokens)
        return (total - slope * tokens) / weight + slope * num_tokens


def _interpolated(found: dict[int, float]) -> list[float]:
    """Between two sizes a line; beyond them, as between the last two; never less than before."""
    sizes = sorted(found)
    table = [found[sizes[0]]] * (_MOST + 1)
    slope = _PRIOR * found[sizes[0]]
    for at in range(sizes[0] + 1, _MOST + 1):
        low = max(size for size in sizes if size < at)
        high = next((size for size in sizes if size >= at), None)
        if high is not None:
            slope = (found[high] - found[low]) / (high - low)
        table[at] = max(table[at - 1], found[low] + slope * (at - low))
    return table
