"""Who runs the engine's steps: one thread at a time has the driver's place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastgen.errors import ReentrantCallError


class StepLock:
    """The place, and the condition that is signalled whenever somebody leaves it.

    Attributes:
        changed: its lock also guards what the engine's threads hand each other.
        driver: the thread that has the place.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.driver: int | None = None
        self._num_claims = 0

    @contextmanager
    def held(self, *, wait: bool, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the place, if it is free or becomes free before `until()` is true; whether it was.

        Raises:
            ReentrantCallError: the thread has it already.
        """
        with self._held(wait, until, lambda: self.driver is None and not self._num_claims) as has:
            yield has

    def drive(self, step: Callable[[], None], until: Callable[[], bool]) -> None:
        """Take part in driving until `until()` is true: one step whenever the place is free.

        Whoever waits is asked after every step, its own or another's.

        Raises:
            EngineError: the thread has the place already.
        """
        while not until():
            with self.held(wait=True, until=until) as driving:
                if driving and not until():
                    step()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the place; who drives step after step lets those pass who claim it."""
        with self.changed:
            self._num_claims += 1
        try:
            with self._held(True, lambda: False, lambda: self.driver is None):
                yield
        finally:
            with self.changed:
                self._num_claims -= 1
                self.changed.notify_all()

    def refuse_in_own_step(self) -> None:
        if self.driver == threading.get_ident():
            raise ReentrantCallError("a step cannot wait for the engine that runs it")

    @contextmanager
    def _held(
        self, wait: bool, until: Callable[[], bool], is_free: Callable[[], bool]
    ) -> Iterator[bool]:
        has = False
        try:
            with self.changed:
                while not (free := is_free()) and wait and not until():
                    self.refuse_in_own_step()
                    self.changed.wait()
                has = free
                if has:
                    self.driver = threading.get_ident()
            yield has
        finally:
            if has:
                with self.changed:
                    self.driver = None
                    self.changed.notify_all()
