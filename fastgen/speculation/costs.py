"""What a step costs, by its number of tokens: measured at warm-up, and by every step that runs.
What a drafter's answer costs, by how much it is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # tokens of the steps that are measured
_ROUNDS = 3
_MOST_BITS = 9
_MEMORY = 256  # times after which a factor that had none of them is forgotten
_MOST = 256  # larger steps are not told apart
_PRIOR = 0.05  # of one token's step for each token more, as long as nothing was measured
_FACTORS = (0.25, 8.0)
_SMOOTHING = 0.1  # the weight of a drafter's new answer, once several are known
_ASK_OUTLIER = 8.0  # times what was expected that it counts for at most
_ORIGIN = 0.3  # the weight of "no tokens take no time" among its answers
# Standard deviations: of one measurement and of what the rows' time moves by from step to step, as
# shares of it; of a factor at first and at most, and of what it moves by. A time counts for so many
# of them above what was expected at most.
_NOISE, _DRIFT = 0.1, 0.01
_FACTOR_DEVIATION, _FACTOR_DRIFT = 1.0, 0.01
_OUTLIER = 2.0


@dataclass(slots=True)
class _Estimate:
    value: float
    variance: float


class StepCosts:
    """Seconds of a step with n rows, and of drafted tokens that it takes besides.

    What rows cost grows with their contexts, and is followed by the time of each step. What further
    tokens of the same rows cost depends on the tiles of the products: a table of whole steps,
    measured by `measure`, says how it grows, and a factor how much of that is seen: one each for
    one drafted token, 2 or 3, 4 to 7, and so on, since the first of a step costs more than its
    place in a tile.
    """

    def __init__(self) -> None:
        self._table: list[float] = []  # of a step with n tokens of one row; empty: not measured
        self._rows: dict[int, _Estimate] = {}  # seconds without drafts
        self._factors: dict[int, _Estimate] = {}  # by the bits of the number of drafted tokens
        self._factor_of = [1.0] * (_MOST_BITS + 1)  # the same, and where nothing is known
        self._covariances: dict[tuple[int, int], float] = {}  # of a time and a factor
        self._num_times = 0
        self._renewed: set[int] = set()  # factors of the times since some were forgotten

    @property
    def is_measured(self) -> bool:
        """Whether there is any time yet."""
        return bool(self._table or self._rows)

    def measure(self, step: Callable[[int], float], most: int) -> None:
        """Fill the table.

        Args:
            step: makes a step with so many tokens of one row, and returns the seconds it took.
            most: tokens that a step may have.
        """
        sizes = [size for size in SIZES if size <= most]
        found = dict.fromkeys(sizes, math.inf)
        for _ in range(_ROUNDS):  # of all sizes: the first steps are slower than those after them
            for size in sizes:
                found[size] = min(found[size], step(size))
        if min(found.values(), default=0) > 0:
            self._table = _interpolated(found)
            self._factors.clear()
            self._covariances.clear()
            self._spread_factors()

    def observe(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """A step with a token for each of so many rows, and so many drafted ones, took so long."""
        if num_rows < 1 or seconds <= 0:
            return
        rows = self._rows.get(num_rows)
        if rows is None:
            seconds = max(seconds - self._extra(num_rows, num_drafted), seconds / 4)
            self._rows[num_rows] = _Estimate(seconds, (_NOISE * seconds) ** 2)
            return
        rows.variance += (_DRIFT * rows.value) ** 2
        self._correct(num_rows, num_drafted, seconds)

    def _correct(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """seconds = rows + extra * factor: a Kalman filter (Kalman, 1960) of two values."""
        rows, factor = self._rows[num_rows], self._known_factor(num_drafted)
        expected = self.seconds(num_rows, num_drafted)
        extra = self._extra_of_table(num_rows, num_drafted)
        key = num_rows, _bits(num_drafted)
        most = 0.9 * (rows.variance * factor.variance) ** 0.5  # others have changed either since
        both = min(max(self._covariances.get(key, 0.0), -most), most)
        of_rows, of_factor = rows.variance + extra * both, both + extra * factor.variance
        total = of_rows + extra * of_factor + (_NOISE * expected) ** 2
        error = min(seconds - expected, _OUTLIER * total**0.5)
        rows.value = max(rows.value + of_rows / total * error, rows.value / 2)
        factor.value = min(max(factor.value + of_factor / total * error, _FACTORS[0]), _FACTORS[1])
        rows.variance -= of_rows**2 / total
        factor.variance -= of_factor**2 / total
        self._covariances[key] = both - of_rows * of_factor / total
        self._renewed.add(key[1])
        self._num_times += 1
        if self._num_times % _MEMORY == 0:  # what kept a factor high may be over
            self._factors = {bits: self._factors[bits] for bits in self._renewed - {0}}
            self._renewed.clear()
        if num_drafted or not self._renewed:
            self._spread_factors()

    def seconds(self, num_rows: int, num_drafted: int = 0) -> float:
        """Of a step with so many rows and drafted tokens; 0 if nothing is known."""
        return self._without(num_rows) + self._extra(num_rows, num_drafted)

    def _without(self, num_rows: int) -> float:
        known = self._rows.get(num_rows)
        if known is not None:
            return known.value
        if not self._rows:
            return self._table[min(num_rows, _MOST)] if self._table else 0.0
        nearest = min(self._rows, key=lambda rows: abs(rows - num_rows))
        return self._rows[nearest].value * self._shape(num_rows) / self._shape(nearest)

    def _extra(self, num_rows: int, num_drafted: int) -> float:
        factor = self._factor_of[_bits(num_drafted)]
        return factor * self._extra_of_table(num_rows, num_drafted)

    def _extra_of_table(self, num_rows: int, num_drafted: int) -> float:
        return self._shape(num_rows + num_drafted) - self._shape(num_rows)

    def _known_factor(self, num_drafted: int) -> _Estimate:
        bits, most = _bits(num_drafted), _FACTOR_DEVIATION**2
        if not bits:
            return _Estimate(1.0, 0.0)
        factor = self._factors.setdefault(bits, _Estimate(self._factor_of[bits], most))
        factor.variance = min(factor.variance + _FACTOR_DRIFT**2, most)
        return factor

    def _spread_factors(self) -> None:
        """Where nothing is known, halfway from that of fewer tokens to 1."""
        last = 1.0
        for bits in range(1, _MOST_BITS + 1):
            known = self._factors.get(bits)
            last = last**0.5 if known is None else known.value
            self._factor_of[bits] = last

    def _shape(self, num_tokens: int) -> float:
        """Of a step with so many tokens, as the table or the prior has it."""
        if self._table:
            return self._table[min(num_tokens, _MOST)]
        if not self._rows:
            return 0.0
        num_rows, rows = next(iter(self._rows.items()))
        return rows.value * (1 + _PRIOR * (num_tokens - 1)) / (1 + _PRIOR * (num_rows - 1))


def _bits(num_drafted: int) -> int:
    return min(num_drafted.bit_length(), _MOST_BITS)


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
        known = self.seconds(num_tokens)
        if known > 0:
            seconds = min(seconds, _ASK_OUTLIER * known)
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
    """Between two sizes a line; beyond them, as between the last two; never more than after it."""
    sizes = sorted(found)
    for size, larger in reversed(list(itertools.pairwise(sizes))):
        found[size] = min(found[size], found[larger])
    table = [found[sizes[0]]] * (_MOST + 1)
    slope = _PRIOR * found[sizes[0]]
    for at in range(sizes[0] + 1, _MOST + 1):
        low = max(size for size in sizes if size < at)
        high = next((size for size in sizes if size >= at), None)
        if high is not None:
            slope = (found[high] - found[low]) / (high - low)
        table[at] = found[low] + slope * (at - low)
    return table
