"""An identity changes with every change of a file, however it is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgen.checkpoints.identity import identity_of
from packed_files import settled
from tiny_checkpoints import write_checkpoint
from waits import wait_until


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return settled(write_checkpoint(tmp_path / "model")) / "model.safetensors"


def _flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)  # times, too
    copy.rename(path)


def _grow_and_shrink(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"x")
    os.truncate(path, size)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a byte of the header": lambda path: _flip(path, 20),
    "the first weight": lambda path: _flip(path, 4000),
    "the last byte": lambda path: _flip(path, -1),
    "a copy in its place": _replace,
    "longer and short again": _grow_and_shrink,
    "written again, the same": lambda path: path.write_bytes(path.read_bytes()),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_shows_though_the_time_is_set_back(
    change: Callable[[Path], Any], weights: Path
) -> None:
    before, status = identity_of([weights]), weights.stat()
    assert before is not None and before == identity_of([weights])
    change(weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = identity_of([weights])
    assert after is not None and after.digest != before.digest


def test_times_that_lie_are_not_enough(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content counts, too: file systems of networks may give a new file any time."""
    status, before = os.stat(weights), identity_of([weights])
    monkeypatch.setattr("fastgen.checkpoints.identity.os.fstat", lambda file: status)
    assert identity_of([weights]) == before
    _flip(weights, 4000)
    after = identity_of([weights])
    assert before is not None and after is not None and after.digest != before.digest


def test_files_of_another_order_are_others(weights: Path) -> None:
    other = weights.with_name("other")
    shutil.copy(weights, other)
    one, two = identity_of([weights, other]), identity_of([other, weights])
    assert one is not None and two is not None and one.digest != two.digest


@pytest.mark.parametrize("nanoseconds", [0, 1])
def test_a_file_that_has_just_changed_is_not_settled(
    nanoseconds: int, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change in the same tick of the file system's clock would not be seen."""
    seconds = weights.stat().st_ctime_ns // 10**9
    changed = seconds * 10**9 + nanoseconds
    status = os.stat(weights)
    fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
    told = type("Status", (), {**fields, "st_ctime_ns": changed})
    monkeypatch.setattr("fastgen.checkpoints.identity.os.fstat", lambda file: told)
    tick = 50 * 10**6 if nanoseconds else 2 * 10**9
    for after, is_settled in ((0, False), (tick, False), (tick + 1, True)):
        monkeypatch.setattr("fastgen.checkpoints.identity.time.time_ns", lambda: changed + after)  # noqa: B023
        identity = identity_of([weights])
        assert identity is not None and identity.is_settled == is_settled


def test_what_is_no_file_has_none(tmp_path: Path, weights: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere"):
        assert identity_of([weights, path]) is None


def test_a_new_file_settles(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"x")

    def is_settled() -> bool:
        identity = identity_of([path])
        return identity is not None and identity.is_settled

    wait_until(is_settled)
