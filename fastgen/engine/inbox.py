"""What any thread hands the one that drives the engine: rows, cancellations, deadlines."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fastgen.checks import real
from fastgen.engine.requests import Request, Row


@dataclass(slots=True)
class Pending:
    """`arrived` are in the order they came; `late` are requests whose deadline has passed."""

    arrived: deque[Row]
    cancelled: deque[Request]
    late: list[Request]


@dataclass(slots=True)
class Inbox:
    """Not thread-safe: the driver's place has a lock for it."""

    arrived: deque[Row] = field(default_factory=deque)
    cancelled: deque[Request] = field(default_factory=deque)
    _deadlines: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap
    _most_deadlines: int = 64  # with more, those of finished requests are dropped

    def add(self, request: Request) -> None:
        self.arrived.extend(request.rows)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, id(request), request))
            if len(self._deadlines) > self._most_deadlines:
                self._deadlines = [one for one in self._deadlines if not one[2].done]
                heapq.heapify(self._deadlines)
                self._most_deadlines = max(64, 2 * len(self._deadlines))

    @property
    def has_endings(self) -> bool:
        """Whether a request was cancelled, or may be late."""
        deadlines = self._deadlines
        return bool(self.cancelled) or (bool(deadlines) and deadlines[0][0] <= time.monotonic())

    def take(self) -> Pending:
        """All in one piece: a request that is ended has its rows in the queue by then."""
        pending = Pending(self.arrived, self.cancelled, self._take_late())
        self.arrived, self.cancelled = deque(), deque()
        return pending

    def _take_late(self) -> list[Request]:
        """Finished requests leave when they come to the front."""
        late: list[Request] = []
        while self._deadlines:
            deadline, _, request = self._deadlines[0]
            if not request.done and deadline > time.monotonic():
                break
            heapq.heappop(self._deadlines)
            late.append(request)
        return late


def deadline_in(timeout: Any) -> float | None:
    """The time.monotonic() that is `timeout` seconds away; None for None."""
    if timeout is None:
        return None
    return time.monotonic() + real("timeout", timeout, 0, math.inf)
