"""Who runs the engine's steps: one thread at a time has the driver's place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastgen.errors import ForkedEngineError, ReentrantCallError


class StepLock:
    """The place, and the condition that is signalled whenever somebody leaves it.

    Attributes:
        changed: its lock also guards what the engine's threads hand each other.
        driver: the thread that has the place.
        lost: why this is a forked child's useless copy; "" if it is not. The lock may be taken for
            good then, and the place as well: nobody may wait for them.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.driver: int | None = None
        self.lost = ""
        self._claims: list[int] = []  # threads that claim it

    @contextmanager
    def held(self, *, wait: bool, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Hold the place, if it is free or becomes free before `until()` is true; whether it was.

        Raises:
            ReentrantCallError: the thread has it already.
            ForkedEngineError: the engine is lost.
        """
        self.refuse_if_lost()
        with self._held(wait, until, lambda: self.driver is None and not self._claims) as has:
            yield has

    def drive(self, step: Callable[[], None], until: Callable[[], bool]) -> None:
        """Take part in driving until `until()` is true: one step whenever the place is free.

        Whoever waits is asked after every step, its own or another's.

        Raises:
            ReentrantCallError, ForkedEngineError: as `held`.
        """
        while not until():
            with self.held(wait=True, until=until) as driving:
                if driving and not until():
                    step()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the place; who drives step after step lets those pass who claim it.

        Raises:
            ForkedEngineError: the engine is lost.
        """
        self.refuse_if_lost()
        me = threading.get_ident()
        with self.changed:
            self._claims.append(me)
        try:
            with self._held(True, lambda: False, lambda: self.driver is None):
                yield
        finally:
            with self.changed:
                self._claims.remove(me)
                self.changed.notify_all()

    def hold(self, until: float) -> bool:
        """Keep all other threads from the place and from `changed`, from between two steps on;
        whether that was possible before the time.monotonic() `until`. To be let go.

        Within a step of this thread's own nothing is waited for.
        """
        if not self.changed.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        me, held = threading.get_ident(), False
        self._claims.append(me)
        try:
            held = self.changed.wait_for(
                lambda: self.driver in (None, me), max(0.0, until - time.monotonic())
            )
        finally:
            if not held:
                self.let_go()
        return held

    def let_go(self) -> None:
        self._claims.remove(threading.get_ident())
        self.changed.notify_all()
        self.changed.release()

    def forget_others(self) -> None:
        """While it is held, in a forked child: no other thread claims the place any more."""
        self._claims = [one for one in self._claims if one == threading.get_ident()]

    def refuse_if_lost(self) -> None:
        if self.lost:
            raise ForkedEngineError(self.lost)

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
