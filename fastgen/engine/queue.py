"""Rows that wait for a seat and blocks, in the order of their queue keys."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from fastgen.engine.requests import Row

BYPASS = 1000  # a level of priority is worth as many places in the queue


class WaitingQueue:
    """A row of priority p has the queue key of one that came 1000 * p rows later.

    So in queues shorter than that a more urgent row always goes first, and none starves: rows that
    come 1000 * (p + 1000) or more after it all go after it, since -1000 is the most urgent. Every
    operation is O(log n) a row; rows that end while they wait are dropped when they come up, or
    when they are most of the queue.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Row]] = []  # no two queue keys are equal
        self._num_arrived = 0
        self._num_ended = 0  # rows in the heap that wait no longer

    def __len__(self) -> int:
        return len(self._heap) - self._num_ended

    def __iter__(self) -> Iterator[Row]:
        """In no particular order."""
        return (row for _, row in self._heap if row.schedule.is_waiting)

    def add(self, row: Row) -> None:
        number, self._num_arrived = self._num_arrived, self._num_arrived + 1
        row.schedule.queue_key = (number + BYPASS * row.request.priority, number)
        self.put_back([row])

    def put_back(self, rows: Iterable[Row]) -> None:
        """Rows that were taken and go on waiting."""
        for row in rows:
            row.schedule.is_waiting = True
            heapq.heappush(self._heap, (row.schedule.queue_key, row))

    def pop(self) -> Row:
        """Take the row with the lowest queue key.

        Raises:
            IndexError: none waits.
        """
        while True:
            _, row = heapq.heappop(self._heap)
            if row.schedule.is_waiting:
                row.schedule.is_waiting = False
                return row
            self._num_ended -= 1

    def remove(self, row: Row) -> None:
        """The row waits no longer; harmless if it did not."""
        if not row.schedule.is_waiting:
            return
        row.schedule.is_waiting = False
        self._num_ended += 1
        if self._num_ended > len(self):
            self._heap = [item for item in self._heap if item[1].schedule.is_waiting]
            heapq.heapify(self._heap)
            self._num_ended = 0
