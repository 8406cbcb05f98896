"""How many drafted tokens each row of a step gets: as many as make the text come fastest.

A drafted token that is right with probability p, and stands at place i of its row's draft, adds p^i
tokens to what a step is expected to give. The tokens that add most are taken first, and as many of
them as make expected tokens a second highest: where one more token crosses the border of a tile, it
has to pay for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgen.speculation.costs import StepCosts

# Times as many tokens a second as without drafts are expected, or there are none: the engine's own
# work with them is in no step's time.
_MARGIN = 1.1
_UNKNOWN = 3  # tokens of a drafter that takes time, as long as no step's time is known
_LEAST = 0.02  # tokens that add less are not looked at


def choose_lengths(
    shares: Sequence[float],
    most: Sequence[int],
    num_rows: int,
    costs: StepCosts,
    room: int,
) -> list[int]:
    """How many of each row's drafted tokens are worth a place in the step.

    Args:
        shares: the probability of each row with a draft that its next drafted token is right.
        most: how many tokens its draft has.
        num_rows: rows of the step; each feeds a token, and gets at least one.
        room: drafted tokens that the step has place for.
    """
    gains = sorted(
        (
            (share**place, -row)
            for row, (share, count) in enumerate(zip(shares, most, strict=True))
            for place in range(1, _worth(share, count) + 1)
        ),
        reverse=True,
    )[:room]
    without = costs.seconds(num_rows)
    expected, best, num_best = float(num_rows), _MARGIN * num_rows / without if without else 0.0, 0
    for count, (gain, _) in enumerate(gains, 1):
        expected += gain
        seconds = costs.seconds(num_rows, count)
        rate = expected / seconds if seconds else expected
        if rate > best:
            best, num_best = rate, count
    lengths = [0] * len(shares)
    for _, row in gains[:num_best]:
        lengths[-row] += 1
    return lengths


def choose_rounds(
    shares: Sequence[float],
    most: int,
    num_rows: int,
    costs: StepCosts,
    ask_seconds: Callable[[int], float],
    answered: float = 1.0,
) -> int:
    """How many tokens a drafter is asked for that takes time itself; 0: it is not worth its time.

    Args:
        shares: as of choose_lengths, of the rows that it is asked for.
        most: tokens that a row may get.
        ask_seconds: of asking it for so many tokens for each of these rows.
        answered: the share of rows for which it has a draft.
    """
    if not costs.is_measured:
        return min(most, _UNKNOWN)
    without = costs.seconds(num_rows)
    best, num_best = _MARGIN * num_rows / max(without, 1e-9), 0
    expected, chances = float(num_rows), [1.0] * len(shares)
    for count in range(1, most + 1):
        chances = [chance * share for chance, share in zip(chances, shares, strict=True)]
        expected += answered * sum(chances)
        more = costs.seconds(num_rows, count * len(shares)) - without
        seconds = without + answered * more + ask_seconds(count)
        if seconds and expected / seconds > best:
            best, num_best = expected / seconds, count
    return num_best


def _worth(share: float, count: int) -> int:
    """Places of a draft that add more than next to nothing."""
    gain, places = share, 0
    while places < count and gain > _LEAST:
        places += 1
        gain *= share
    return places
