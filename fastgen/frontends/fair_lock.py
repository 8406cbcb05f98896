"""FairLock: a lock that is handed on in the order in which it was asked for.

Models that share a processor run their steps alternately, so that none waits for another's requests
to end. `threading.Lock` would let the thread that leaves it take it again at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A fair lock, as a context manager."""

    def __init__(self) -> None:
        self._make()

    def _make(self) -> None:
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def _forget_parent(self) -> None:
        """In a forked child nobody has it but, perhaps, the thread that forked."""
        if self._pid != os.getpid():
            self._make()

    def __enter__(self) -> None:
        self._forget_parent()
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until it is handed on

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._forget_parent()
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
