"""Whose files the cache trusts, and what it removes."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgen.decoders.pack_cache import PackCache
from fastgen.native import native
from packed_files import digest_of, entry_of, load, messages, packings

pytestmark = [
    pytest.mark.skipif(native is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no cache"),
]

ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)
KEYS = ["0" * 64, "1" * 64, "2" * 64, "3" * 64]


@pytest.fixture(autouse=True)
def every_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastgen")


# Who may write to it. Whatever lies there, the model is the checkpoint's.


def give_away(path: Path) -> None:
    os.chown(path, 12345, -1, follow_symlinks=False)


def replace_by_link(path: Path) -> None:
    os.rename(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


Spoil = Callable[[Path], None]
ENTRIES: dict[str, Any] = {
    "writable to the group": lambda path: path.chmod(0o620),
    "writable to all": lambda path: path.chmod(0o602),
    "a link": replace_by_link,
    "a pipe": replace_by_pipe,
    "a device": replace_by_device,
    "another's": pytest.param(give_away, marks=ROOT),
}
FOLDERS: dict[str, Any] = {
    "writable to the group": lambda path: path.chmod(0o770),
    "writable to all": lambda path: path.chmod(0o1777),
    "a link": replace_by_link,
    "a file": replace_by_file,
    "another's": pytest.param(give_away, marks=ROOT),
}


@pytest.mark.parametrize("spoil", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_another_may_have_written_is_replaced(
    spoil: Spoil,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest = digest_of(folder, cache)
    entry = entry_of(cache)
    spoil(entry)
    with packings(monkeypatch) as packed:
        assert digest_of(folder, cache) == digest
        assert len(packed) == 1
        [(level, text)] = messages(caplog)
        assert level == logging.WARNING and str(entry.name) in text
        assert digest_of(folder, cache) == digest
    assert len(packed) == 1 and messages(caplog) == []
    assert entry.is_file() and not entry.is_symlink()


def test_a_folder_in_an_entrys_place_is_left_there(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = digest_of(folder, cache)
    replace_by_folder(entry_of(cache))
    for _ in range(2):
        assert digest_of(folder, cache) == digest
        assert [level for level, _ in messages(caplog)] == [logging.WARNING]
    assert entry_of(cache).is_dir()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("spoil", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_others_may_write_to_is_not_used(
    spoil: Spoil,
    share: bool,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest = digest_of(folder, cache)
    spoil(cache)
    before = cache.stat()
    with packings(monkeypatch) as packed:
        assert digest_of(folder, cache, share_weights=share) == digest
    assert len(packed) == 1
    [(level, text)] = messages(caplog)
    assert level == logging.WARNING and str(cache) in text
    assert cache.stat() == before


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/cache", "/dev/full"])
def test_a_place_that_cannot_be_written_to_costs_a_line(
    place: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert digest_of(folder, place) == digest_of(folder, False)
    assert len(messages(caplog)) == 1


# What it removes.


def fill(cache: PackCache, keys: list[str], size: int) -> None:
    """Entries of some bytes, the first used longest ago."""
    for age, key in enumerate(reversed(keys)):
        cache.store(key, size, lambda file: assert_written(file, bytes(size)))
        os.utime(cache.where(key), (1000 - age, 1000 - age))


def assert_written(file: int, content: bytes) -> None:
    assert os.write(file, content) == len(content)


def test_the_least_recently_used_goes_first(cache: Path) -> None:
    kept = PackCache(cache, max_bytes=350)
    fill(kept, KEYS[:3], 100)
    assert [entry.key for entry in kept.entries()] == KEYS[2::-1]
    with kept.opened(KEYS[0]) as file:
        kept.touch(file)
    kept.store(KEYS[3], 100, lambda file: assert_written(file, bytes(100)))
    assert {entry.key for entry in kept.entries()} == {KEYS[0], KEYS[2], KEYS[3]}
    kept.store(KEYS[1], 340, lambda file: assert_written(file, bytes(340)))
    assert [(entry.key, entry.num_bytes) for entry in kept.entries()] == [(KEYS[1], 340)]
    with pytest.raises(OSError, match="FASTGEN_CACHE_SIZE"):
        kept.store(KEYS[0], 351, lambda file: pytest.fail("it is too large"))
    assert [entry.key for entry in kept.entries()] == [KEYS[1]]
    kept.store(KEYS[1], 350, lambda file: assert_written(file, bytes(350)))  # in its own place
    assert [(entry.key, entry.num_bytes) for entry in kept.entries()] == [(KEYS[1], 350)]


def test_files_of_other_names_are_left_alone(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    others = ["x", "0.packed", "x" * 64 + ".packed", "." + "0" * 64 + ".tmp", "0" * 64]
    for name in others:
        (cache / name).write_bytes(bytes(1000))
    kept = PackCache(cache, max_bytes=100)
    kept.store(KEYS[0], 100, lambda file: assert_written(file, bytes(100)))
    kept.store(KEYS[1], 100, lambda file: assert_written(file, bytes(100)))
    assert [entry.key for entry in kept.clear()] == [KEYS[1]]
    assert kept.entries() == [] and {path.name for path in cache.iterdir()} == set(others)


def test_nothing_is_there_to_list_or_clear(cache: Path) -> None:
    assert PackCache(cache).entries() == PackCache(cache).clear() == []
    assert not cache.parent.exists()


def test_a_disk_is_not_filled(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = os.statvfs(folder)
    fields = {name: getattr(disk, name) for name in dir(disk) if name.startswith("f_")}
    full = type("Disk", (), {**fields, "f_bavail": 1, "f_frsize": 512})
    digest = digest_of(folder, False)
    with monkeypatch.context() as patched:
        patched.setattr("fastgen.decoders.pack_cache.os.fstatvfs", lambda file: full)
        assert digest_of(folder, cache) == digest
    [(level, text)] = messages(caplog)
    assert level == logging.INFO and "too little is free" in text
    assert list(cache.iterdir()) == []


def test_what_a_writer_left_is_removed_and_what_one_writes_is_not(
    folder: Path, cache: Path
) -> None:
    cache.mkdir(parents=True, mode=0o700)
    left, written = (cache / f".{key}.{'a' * 16}.tmp" for key in KEYS[:2])
    left.write_bytes(b"half")
    with open(written, "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        load(folder, cache).close()
        assert not left.exists() and written.exists()
    load(folder, cache, dtype="float16").close()
    assert not written.exists() and len(list(cache.iterdir())) == 2
