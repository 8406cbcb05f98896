"""What tests start ends with them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import command_of, started
from waits import wait_until

TESTS = Path(__file__).parents[1] / "helpers"
HANGS = """
import subprocess, sys, time
from pathlib import Path
import processes

PARENT = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); " \\
    "print(child.pid, flush=True); child.wait()"

def test_hangs():
    command = [sys.executable, "-c", PARENT]
    with processes.started(command, stdout=subprocess.PIPE) as parent:
        Path("pids.new").write_text(f"{parent.pid} {parent.stdout.readline()}")
        Path("pids.new").rename("pids")
        time.sleep(600)
"""
WAYS = {
    "its time is over": (["--timeout=15"], None),
    "Ctrl-C": ([], signal.SIGINT),
    "SIGTERM": ([], signal.SIGTERM),
    "SIGTERM to one of several": (["--numprocesses=1"], signal.SIGTERM),
    "SIGKILL to one of several": (["--numprocesses=1"], signal.SIGKILL),
}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("way", WAYS)
def test_a_test_that_is_ended_takes_its_children_along(way: str, tmp_path: Path) -> None:
    """And theirs: each is known by what it runs, for as long as it does."""
    options, number = WAYS[way]
    (tmp_path / "test_hangs.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
    }
    told = tmp_path / "pids"
    with started(
        [*command, "--rootdir=.", *options, "test_hangs.py"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as run:  # fmt: skip
        wait_until(lambda: told.exists() or run.poll() is not None)
        assert told.exists(), run.communicate()[0]
        pids = [int(word) for word in told.read_text().split()]
        assert len(pids) == 2 and all(map(command_of, pids))
        if number is not None:
            run.send_signal(number)
        wait_until(lambda: not any(map(command_of, pids)))
