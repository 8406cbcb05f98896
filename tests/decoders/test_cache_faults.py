"""Faults in a file of packed weights: it is never used, and the model is the checkpoint's own.

Each case spoils the one file of a cache, loads, and compares every byte of the weights, and tokens,
with those of a load without a cache. The same faults in a packed folder are refused by name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastgen
from fastgen.checkpoints.packed import PACKED_FILE, Section
from fastgen.native import native
from packed_files import (
    checkpoint_of,
    digest_of,
    entry_of,
    header_of,
    load,
    packings,
    with_header,
)
from tiny_checkpoints import CONFIG, assert_names

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")

PREAMBLE = 24
NUM_SECTIONS = 2 * (4 + 4 * 5) + 2 + 5 + 1  # int8: of two layers, the last norm, head, positions
NUM_FLIPS = 24  # of single bits in the header


class Good(NamedTuple):
    """A file of packed weights, and the digest of the model that it was made of."""

    folder: Path
    content: bytes
    name: str
    start: int
    digest: str

    @property
    def data(self) -> bytes:
        return self.content[self.start :]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder, cache = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("cache")
    checkpoint_of(folder)
    digest = digest_of(folder, False, quantize="int8")
    assert digest_of(folder, cache, quantize="int8") == digest
    entry = entry_of(cache)
    header, start = header_of(entry)
    assert len(header.sections) == NUM_SECTIONS
    return Good(folder, entry.read_bytes(), entry.name, start, digest)


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    at %= len(content)
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def bad_contents(good: Good) -> dict[str, bytes]:
    """Files that differ from a good one, by what is wrong with them."""
    content, start = good.content, good.start
    size, length = len(content), int.from_bytes(content[8:16], "little")
    found: dict[str, bytes] = {"empty": b"", "longer": content + b"\0", "zeros": bytes(size)}
    found |= {f"cut at {at}": content[:at] for at in _cuts(size, length, start)}
    for at in range(PREAMBLE):
        found[f"preamble byte {at}"] = flipped(content, at, at % 8)
    for number in range(NUM_FLIPS):
        at = PREAMBLE + length * number // NUM_FLIPS
        found[f"header byte {at}"] = flipped(content, at, number % 8)
    for at in (PREAMBLE + length, start - 1):
        found[f"padding byte {at}"] = flipped(content, at)
    return found | _bad_sections(good)


def _cuts(size: int, length: int, start: int) -> list[int]:
    around = [
        1,
        7,
        8,
        16,
        23,
        PREAMBLE,
        PREAMBLE + 1,
        PREAMBLE + length,
        start - 1,
        start,
        size - 1,
    ]
    return sorted({*around, start + 1, size - 64, *(size * part // 16 for part in range(1, 16))})


def _bad_sections(good: Good) -> dict[str, bytes]:
    """The first, a middle and the last byte of each section, one of them flipped, or all zeros."""
    found = {}
    for number, section in enumerate(_header(good).sections):
        offset, num_bytes, _ = section
        for place, at in (("first", 0), ("middle", num_bytes // 2), ("last", num_bytes - 1)):
            whole = good.start + offset + at
            found[f"section {number}, {place} byte"] = flipped(good.content, whole, number % 8)
    return found


def _header(good: Good) -> Any:
    scratch = good.folder.parent / "header"
    scratch.write_bytes(good.content)
    return header_of(scratch)[0]


def lying_headers(good: Good) -> dict[str, bytes]:
    """Headers with right checksums that say something else."""
    header = _header(good)
    sections, data = header.sections, good.data
    swapped = (sections[1], sections[0], *sections[2:])
    moved = tuple(Section(o + 64, n, c) for o, n, c in sections)
    merged = (Section(0, sections[0].num_bytes + sections[1].num_bytes, 0), *sections[2:])
    other_sum = (*sections[:-1], sections[-1]._replace(checksum=sections[-1].checksum ^ 1))
    negative = (Section(0, -64, 0), Section(-64, 64 + sections[0].num_bytes, 0), *sections[1:])
    changes: dict[str, dict[str, Any]] = {
        "another key": {"key": "0" * 64},
        "no key": {"key": ""},
        "another dtype": {"dtype": "float32"},
        "an unknown dtype": {"dtype": "float8"},
        "other weights": {"weights": "bfloat16"},
        "unknown weights": {"weights": "int4"},
        "another layout": {"layout": header.layout.replace("1/", "2/", 1)},
        "no layout": {"layout": ""},
        "a layout that is no string": {"layout": 1},
        "no sections": {"sections": ()},
        "a section less": {"sections": sections[:-1]},
        "sections in another order": {"sections": swapped},
        "sections elsewhere": {"sections": moved},
        "larger sections": {"sections": merged},
        "another checksum": {"sections": other_sum},
        "a negative size": {"sections": negative},
        "a section of two numbers": {"sections": ((0, 64), *sections[1:])},
        "a section that is no number": {"sections": (("a", "b", "c"), *sections[1:])},
    }
    found = {
        name: with_header(good.content, header, good.start, **change)
        for name, change in changes.items()
    }
    for name, text in {
        "no JSON": b"{",
        "a list": b"[]",
        "a number": b"1",
        "no fields": b"{}",
        "nested deeply": b"[" * 50_000,
        "not UTF-8": b'{"layout": "\xff"}',
        "infinite": b'{"layout": Infinity}',
    }.items():
        found[name] = signed(text) + data
    return found


def signed(text: bytes, version: bytes = b"fastgen\x01") -> bytes:
    """A header of any text, with a right checksum."""
    padding = bytes(-(PREAMBLE + len(text)) % 65536)
    told = struct.pack("<Q", len(text)) + text + padding
    checksum = native.xxh64(np.frombuffer(told, np.uint8))
    return struct.pack("<8sQQ", version, len(text), checksum) + text + padding


def faults(good: Good) -> Iterator[tuple[str, bytes]]:
    yield from bad_contents(good).items()
    yield from lying_headers(good).items()
    header = good.content[PREAMBLE : good.start].rstrip(b"\0")
    yield "version 0", signed(header, b"fastgen\x00") + good.data
    yield "version 2", signed(header, b"fastgen\x02") + good.data
    yield "another magic", signed(header, b"fastgem\x01") + good.data
    yield "a checkpoint", (good.folder / "model.safetensors").read_bytes()


def test_there_are_enough_faults(good: Good) -> None:
    found = list(faults(good))
    assert len(found) == len(dict(found)) >= 200
    assert all(content != good.content for _, content in found)


@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
def test_no_fault_is_used_or_fatal(
    share: bool,
    good: Good,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A line in the log, and a good file in its place."""
    caplog.set_level(logging.DEBUG, "fastgen")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for name, content in faults(good):
        write_entry(cache / good.name, content)
        caplog.clear()
        with packings(monkeypatch) as packed:
            found = digest_of(good.folder, cache, quantize="int8", share_weights=share)
        assert found == good.digest, name
        assert len(packed) == 1, name
        assert [record.levelno for record in caplog.records] == [logging.WARNING], name
        assert (cache / good.name).read_bytes() == good.content, name


def write_entry(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)


def test_the_good_file_is_used(good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would be shown."""
    tmp_path.chmod(0o700)
    write_entry(tmp_path / good.name, good.content)
    with packings(monkeypatch) as packed:
        assert digest_of(good.folder, tmp_path, quantize="int8") == good.digest
    assert packed == []


def test_a_file_under_another_models_key_is_not_used(
    good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same shape, so that nothing but the key tells them apart."""
    other = checkpoint_of(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    digest = digest_of(other, cache, quantize="int8")
    write_entry(entry_of(cache), good.content)
    with packings(monkeypatch) as packed:
        assert digest_of(other, cache, quantize="int8") == digest != good.digest
    assert len(packed) == 1


@pytest.fixture(scope="module")
def packed(good: Good, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fastgen.pack(good.folder, tmp_path_factory.mktemp("packed") / "model", quantize="int8")


def test_faults_in_a_packed_folder_are_refused(good: Good, packed: Path, tmp_path: Path) -> None:
    content = (packed / PACKED_FILE).read_bytes()
    _, start = header_of(packed / PACKED_FILE)
    own = good._replace(content=content, start=start, folder=good.folder)
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    assert digest_of(folder, False) == good.digest
    for name, fault in faults(own):
        if name in (
            "no key",
            "another dtype",
        ):  # no folder has a key, and activations may be either
            continue
        (folder / PACKED_FILE).write_bytes(fault)
        for share in (False, True):
            with pytest.raises(fastgen.CheckpointError) as caught:
                load(folder, False, share_weights=share).close()
            assert_names(str(caught.value), PACKED_FILE)


def test_special_files_in_a_packed_folder_are_refused(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    path = folder / PACKED_FILE
    outside = path.rename(tmp_path / "outside")
    makes: tuple[Callable[[], Any], ...] = (
        lambda: path.symlink_to(outside),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path),
        path.mkdir,
    )
    for make in makes:
        make()
        with pytest.raises(fastgen.CheckpointError, match="model"):
            load(folder, False)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_config_of_another_shape_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    text = (folder / "config.json").read_text()
    for name in ("n_layer", "n_embd", "vocab_size", "n_positions"):
        wrong = text.replace(f'"{name}": {CONFIG[name]}', f'"{name}": {CONFIG[name] * 2}')
        assert wrong != text
        (folder / "config.json").write_text(wrong)
        with pytest.raises(fastgen.CheckpointError, match=r"config\.json"):
            load(folder, False)


def test_digests_tell_models_apart(good: Good, tmp_path: Path) -> None:
    """By one bit of one weight."""
    assert len(good.digest) == hashlib.sha256().digest_size * 2
    assert digest_of(checkpoint_of(tmp_path, seed=1), False, quantize="int8") != good.digest
