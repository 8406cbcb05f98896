"""Requests of several threads that end in every way at once: what has ended stays as it is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

import processes
from engine_harness import assert_idle, greedy, make_engine, run_all
from fastgen.engine.requests import Request
from waits import WITHIN

CALLS = 75  # of each thread
EXITS = """
import threading, fastgen
model, generated = fastgen.load(), threading.Semaphore(0)
def work():
    while True:
        model.generate("And", max_new_tokens=20)
        generated.release()
threading.excepthook = lambda info: None  # the model is closed when Python ends
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
for _ in range(6):
    generated.acquire()
"""


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_what_has_ended_stays_as_it_is() -> None:
    engine = make_engine()
    ended: list[tuple[Request, str | None, int]] = []
    failures: list[BaseException] = []

    def short(within: float | None) -> None:
        try:
            for _ in range(CALLS):
                deadline = None if within is None else time.monotonic() + within
                request = engine.add_request([5, 6], greedy(max_new_tokens=40), deadline=deadline)
                if deadline is None:
                    engine.cancel(request)
                engine.run(partial(getattr, request, "done"))
                row = request.rows[0]
                ended.append((request, row.finish_reason, len(row.token_ids)))
        except BaseException as error:
            failures.append(error)

    kinds = (None, None, 0.0, 500.0)
    threads = [threading.Thread(target=short, args=(kind,), daemon=True) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    run_all(engine, [engine.add_request([5, 6], greedy(max_new_tokens=50, ignore_eos=True))])
    assert len(ended) == 4 * CALLS
    for request, reason, length in ended:
        [row] = request.rows
        assert (row.finish_reason, len(row.token_ids)) == (reason, length), "changed when over"
        assert request.num_ended == 1
        if request.deadline is not None and request.deadline - request.arrived > 1:
            assert reason != "timeout", "its deadline was minutes away"
    assert_idle(engine)


def test_python_ends_while_a_daemon_generates() -> None:
    process = processes.run([sys.executable, "-c", EXITS])
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
