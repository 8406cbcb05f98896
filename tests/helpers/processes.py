"""Other processes of a test. Each has a process group of its own, which ends with the test.

Whatever such a process has started in that group goes along, also when the test fails, is
interrupted, or runs out of time.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """`options` are Popen's; what comes out is text, or bytes with `text=False`."""
    words = [str(word) for word in command]
    options = {"stdin": subprocess.DEVNULL, "text": True, **options}
    process: subprocess.Popen[Any] = subprocess.Popen(words, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill it and what it has started, and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):  # what it no longer reads cannot be flushed
                stream.close()


def run(
    command: Sequence[object], *, stdin: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """To its end, whatever that is; standard output and error are kept, unless `options` say
    otherwise. How long it may take is up to the test's own time limit.
    """
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, **options}
    if stdin is not None:
        options["stdin"] = pipe
    with started(command, **options) as process:
        out, err = process.communicate(stdin)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def in_fork(work: Callable[[], T]) -> T:
    """What it returns in a forked child, by way of a pickle."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons': of other threads
        pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            returned: T = pickle.load(pipe)
    finally:
        os.waitpid(pid, 0)
    return returned


def command_of(pid: int) -> str:
    """Empty of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def children() -> set[int]:
    """The processes that this one has started and not waited for; none without Linux's /proc."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found.update(map(int, path.read_text().split()))
    return found
