"""Processes that write to the cache at once, end while they write, or share what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import processes
from fastgen.native import native
from packed_files import (
    digest_of,
    entry_of,
    load,
    messages,
    packings,
    tokens_of,
    weights_of,
)

pytestmark = [
    pytest.mark.skipif(native is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no cache"),
]


_LOAD = """
import hashlib, os, sys
import fastgen
sys.stdin.readline()  # all begin at once
model = fastgen.load(sys.argv[1], cache=sys.argv[2], device="cpu", max_batch_size=2,
    share_weights=sys.argv[3:] == ["share"])
[generation] = model.generate([[1, 2, 3, 4]], max_new_tokens=8, temperature=2, seed=1,
    ignore_eos=True)
print(generation.completions[0].token_ids)
"""


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def begin(process: subprocess.Popen[Any]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("share", [[], ["share"]], ids=["copied", "shared"])
def test_processes_that_write_at_once_do_not_meet(
    share: list[str], folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, False) as model:
        expected = f"{tokens_of(model)}\n"
    command = [sys.executable, "-c", _LOAD, folder, cache, *share]
    with ExitStack() as stack:
        started = [stack.enter_context(processes.started(command, **PIPES)) for _ in range(4)]
        for process in started:
            begin(process)
        assert [process.communicate()[0] for process in started] == [expected] * 4
    with packings(monkeypatch) as packed:
        load(folder, cache).close()
    assert packed == [] and entry_of(cache)


_HELD = f"""
import sys
import fastgen.checkpoints.packed as packed
write, budget = packed.os.write, int(sys.argv.pop())

def held(file, data):
    global budget
    if not budget:
        print("held", flush=True)
        sys.stdin.readline()
    count = write(file, data[:budget])
    budget -= count
    return count

packed.os.write = held
{_LOAD}
"""


@pytest.mark.parametrize("written", [0, 1, 24, 3000, 65536, 65600, 70000])
def test_a_writer_that_is_killed_leaves_nothing_that_is_used(
    written: int, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = digest_of(folder, False)
    command = [sys.executable, "-c", _HELD, folder, cache, str(written)]
    with processes.started(command, **PIPES) as process:
        begin(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        left = entry_of(cache)
        assert left.suffix == ".tmp" and left.stat().st_size == written
        process.kill()
        process.wait()
    assert left.exists()
    assert digest_of(folder, cache) == digest
    assert entry_of(cache) != left and messages(caplog) == []


_FULL = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()),) * 2)
{_LOAD}
"""


@pytest.mark.parametrize("limit", [0, 1, 30, 65536, 70000])
def test_a_full_disk_is_harmless(limit: int, folder: Path, cache: Path) -> None:
    with load(folder, False) as model:
        expected = f"{tokens_of(model)}\n"
    command = [sys.executable, "-c", _FULL, folder, cache, str(limit)]
    done = processes.run(command, stdin="\n")
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_cut_off_later_cannot_hurt_a_copy(folder: Path, cache: Path) -> None:
    load(folder, cache).close()
    with load(folder, cache) as model:
        before = weights_of(model), tokens_of(model)
        os.truncate(entry_of(cache), 0)
        assert (weights_of(model), tokens_of(model)) == before


def test_a_shared_file_that_is_removed_or_replaced_stays_as_it_was(
    folder: Path, cache: Path
) -> None:
    with load(folder, cache, share_weights=True) as model:
        before = weights_of(model), tokens_of(model)
        entry = entry_of(cache)
        entry.unlink()
        assert (weights_of(model), tokens_of(model)) == before
        load(folder, cache).close()
        assert entry_of(cache) == entry
        assert (weights_of(model), tokens_of(model)) == before


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_shared_weights_are_the_files_pages(folder: Path, cache: Path) -> None:
    """Also in the process that has packed them."""
    for _ in range(2):
        with load(folder, cache, share_weights=True) as model:
            tokens_of(model)
            [(rights, mapped)] = mappings_of(str(entry_of(cache)))
            assert rights == "r--s" and mapped["Rss"] > 0 and mapped["Anonymous"] == 0
    with load(folder, cache) as model:
        assert mappings_of(str(entry_of(cache))) == []


def mappings_of(name: str) -> list[tuple[str, dict[str, int]]]:
    """Of a file: the rights of each mapping, and its figures in kilobytes."""
    found: list[tuple[str, dict[str, int]]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = words[-1] == name
            if inside:
                found.append((words[1], {}))
        elif inside and words[-1] == "kB":
            found[-1][1][words[0].removesuffix(":")] = int(words[1])
    return found
