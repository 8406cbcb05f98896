"""Engines and the life of their process: what becomes of them when it forks, and when it ends.

A forked child has only the thread that forked. Steps that other threads run would stay half done
in it, and their locks taken. So a fork waits until every engine is between two steps, and lets none
begin before the child exists; the child then has engines that work. Where a step takes too long (a
row's function may even wait for the thread that forks), the child's copy of that engine is lost,
and whatever it is asked raises at once. So it is where the decoder's threads or device are the
parent's.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  its own lock must be taken after ours: see _before
import os
import threading
import time
import weakref
from typing import NamedTuple, Protocol

from fastgen.engine.step_lock import StepLock
from fastgen.errors import ForkedEngineError

longest_wait = 5.0  # seconds that a fork waits for steps to end, all engines together
_LOST = (
    "this model cannot be used in a forked process: another thread's step had not ended when it "
    "was forked; load a model of its own in this process"
)
_BOUND = (
    "this model cannot be used in a forked process: its decoder's threads or device are those of "
    "the process that loaded it; start processes with the method spawn, or load it with the CPU "
    "decoder"
)
NO_THREAD = (
    "this engine's thread is in the process that this one was forked from; make an engine of its "
    "own here, of the same model"
)


class Holdable(Protocol):
    """A lock that a fork holds; see StepLock."""

    lost: str

    def hold(self, until: float) -> bool: ...

    def let_go(self) -> None: ...

    def forget_others(self) -> None: ...


class Watched(Protocol):
    @property
    def survives_fork(self) -> bool:
        """Whether a child's copy can run steps."""
        ...

    def close(self, timeout: float | None = None) -> None: ...

    def inherit(self) -> None:
        """In a child, while the engine is held: end what only the parent's threads wait for."""
        ...


class ForkLock:
    """A lock for what is not an engine's: a fork waits for whoever has it, as it does for a step.

    Raises:
        ForkedEngineError: this is a child, and it was waited for in vain.
    """

    def __init__(self) -> None:
        self.lost = ""
        self._lock = threading.RLock()
        _fork_locks.add(self)

    def __enter__(self) -> None:
        if self.lost:
            raise ForkedEngineError(self.lost)
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def hold(self, until: float) -> bool:
        return self._lock.acquire(timeout=max(0.0, until - time.monotonic()))

    def let_go(self) -> None:
        self._lock.release()

    def forget_others(self) -> None:
        """Whoever waits for it leaves no trace in it."""


class Origin:
    """The process in which a thread was started; a forked child has only a memory of it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def in_child(self) -> bool:
        """Whether this is a child: the thread is not here, and its locks may be taken for good."""
        return self._pid != os.getpid()

    def refuse_in_child(self) -> None:
        """Raise ForkedEngineError there."""
        if self.in_child:
            raise ForkedEngineError(NO_THREAD)


class _Record(NamedTuple):
    lock: StepLock
    pid: int  # of the process that made it


_records: weakref.WeakKeyDictionary[Watched, _Record] = weakref.WeakKeyDictionary()
_fork_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_held: dict[int, list[Holdable]] = {}  # by the thread that forks just now


def watch(engine: Watched, lock: StepLock) -> None:
    """Keep an engine right in forked children, and close it when Python ends in this process."""
    _records[engine] = _Record(lock, os.getpid())


def _watched() -> list[tuple[Watched, _Record]]:
    """Those that there are, while other threads may make more."""
    engines = (reference() for reference in _records.keyrefs())  # a copy, made in one piece
    return [(engine, _records[engine]) for engine in engines if engine is not None]


def _locks() -> list[Holdable]:
    return [*(record.lock for _, record in _watched()), *_fork_locks.copy()]


def _before() -> None:
    """Python calls hooks that were registered later first. What a step may need (the locks of
    logging and of thread pools, which have hooks as well) is therefore not taken yet."""
    until = time.monotonic() + longest_wait
    _held[threading.get_ident()] = held = []
    for lock in sorted(_locks(), key=id):  # in one order: several threads may fork
        if not lock.lost and lock.hold(until):
            held.append(lock)


def _after_in_parent() -> None:
    for lock in _held.pop(threading.get_ident(), ()):
        lock.let_go()


def _after_in_child() -> None:
    held = _held.pop(threading.get_ident(), [])
    _held.clear()  # of others who forked at the same time, in the parent
    for engine, record in _watched():
        if not engine.survives_fork:
            record.lock.lost = _BOUND
        elif record.lock in held:
            engine.inherit()
    for lock in _locks():
        if lock in held:
            lock.forget_others()
            lock.let_go()
        else:
            lock.lost = lock.lost or _LOST


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )


@atexit.register
def _close_all() -> None:
    """Python must not end while some daemon thread runs a step in C++."""
    for engine, record in _watched():
        if record.pid == os.getpid():  # a forked child has none of its parent's threads
            engine.close(timeout=5)  # a row's function may never return
