"""A model is packed once, and never taken for another one, however its files change."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen.decoders.cpu.packing import pack_weights
from fastgen.decoders.pack_cache import default_folder, default_max_bytes
from fastgen.native import native
from packed_files import (
    checkpoint_of,
    digest_of,
    entry_of,
    load,
    messages,
    packings,
    settled,
    weights_of,
)
from stepping import all_logits

pytestmark = [
    pytest.mark.skipif(native is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no cache"),
]


@pytest.fixture(autouse=True)
def every_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastgen")


def test_a_model_is_packed_once(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "float": {},
        "half": {"dtype": "float16"},
        "int": {"quantize": "int8"},
    }
    with packings(monkeypatch) as packed:
        for count in (3, 3):
            for kind in options.values():
                digest = digest_of(folder, False, **kind)
                assert digest_of(folder, cache, **kind) == digest
                assert digest_of(folder, cache, share_weights=True, **kind) == digest
            assert len(list(cache.iterdir())) == count
    assert packed == [str(folder)] * (3 + 2 * 3)  # the first time, and each time without a cache
    assert messages(caplog) == []
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()} == {0o600}


def test_the_size_of_steps_does_not_matter(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with packings(monkeypatch) as packed:
        for options in ({}, {"max_batch_size": 7}, {"max_seq_len": 8}, {"num_threads": 1}):
            load(folder, cache, **options).close()
    assert len(packed) == 1


def test_the_folder_is_found_by_another_name(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hub's snapshot of another revision has it: a link to the same file."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    load(folder, cache).close()
    os.rename(folder, tmp_path / "moved")
    with packings(monkeypatch) as packed:
        load(tmp_path / "moved", cache).close()
    assert packed == []


def overwrite(folder: Path, new: Path) -> None:
    """In place, of the same size, with the old time of change."""
    old, content = folder / "model.safetensors", (new / "model.safetensors").read_bytes()
    status = old.stat()
    assert len(content) == status.st_size
    with open(old, "r+b") as file:
        file.write(content)
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_over(folder: Path, new: Path) -> None:
    status = (folder / "model.safetensors").stat()
    copy = shutil.copy(new / "model.safetensors", folder / "copy")
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(copy, folder / "model.safetensors")


@pytest.mark.parametrize("change", [overwrite, rename_over])
@pytest.mark.parametrize("wait", [False, True], ids=["at once", "settled"])
def test_a_checkpoint_that_changes_is_never_taken_for_the_old_one(
    change: Callable[[Path, Path], None], wait: bool, folder: Path, cache: Path, tmp_path: Path
) -> None:
    new = checkpoint_of(tmp_path / "new", seed=1)
    old_digest, new_digest = digest_of(folder, cache), digest_of(new, False)
    assert old_digest != new_digest
    change(folder, new)
    if wait:
        settled(folder)
    for _ in range(2):
        assert digest_of(folder, cache) == new_digest


def logits_of(model: fastgen.Generator) -> bytes:
    [logits] = all_logits(model.engine.decoder, [[1, 2, 3]], [3])
    return bytes(logits.data)


def test_a_change_of_config_that_packing_does_not_see_is_seen(folder: Path, cache: Path) -> None:
    with load(folder, cache) as model:
        before, weights = logits_of(model), weights_of(model)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "activation_function": "relu"}')
    assert digest_of(folder, cache) == digest_of(folder, False)
    with load(folder, cache) as model:
        assert logits_of(model) != before and weights_of(model) == weights


def test_a_checkpoint_that_changes_while_it_is_packed_is_not_stored(
    folder: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    new = checkpoint_of(tmp_path / "new", seed=1)

    def pack_and_change(*arguments: Any) -> None:
        pack_weights(*arguments)
        overwrite(folder, new)

    with monkeypatch.context() as patched:
        patched.setattr("fastgen.decoders.cpu.weights.pack_weights", pack_and_change)
        load(folder, cache).close()
    assert not cache.exists()
    assert messages(caplog) == [
        (logging.INFO, f"packed weights are not cached: {folder} has just changed")
    ]


def test_a_model_in_memory_is_not_cached(folder: Path, cache: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder)
    load(peer, cache).close()
    assert not cache.exists()
    with pytest.raises(fastgen.OptionError, match="in memory") as caught:
        load(peer, cache, share_weights=True)
    assert caught.value.option == "share_weights"


# Where it is.


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = str(tmp_path)
    for given, expected in (
        ({"HOME": home}, tmp_path / ".cache" / "fastgen"),
        ({"HOME": home, "XDG_CACHE_HOME": "/x"}, Path("/x/fastgen")),
        ({"HOME": home, "XDG_CACHE_HOME": "relative"}, tmp_path / ".cache" / "fastgen"),
        ({"HOME": home, "XDG_CACHE_HOME": ""}, tmp_path / ".cache" / "fastgen"),
        ({"HOME": home, "XDG_CACHE_HOME": "/x", "FASTGEN_CACHE": "/y"}, Path("/y")),
        ({"HOME": home, "FASTGEN_CACHE": "y"}, Path.cwd() / "y"),
        ({"HOME": home, "FASTGEN_CACHE": "~/y"}, tmp_path / "y"),
        *(({"HOME": home, "FASTGEN_CACHE": off}, None) for off in ("off", "OFF", "0", "false")),
        ({"HOME": "relative"}, None),
    ):
        for name in ("HOME", "XDG_CACHE_HOME", "FASTGEN_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        assert default_folder() == expected


def test_it_is_on_unless_it_is_turned_off(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(cache))
    with load(folder, False) as model:
        assert model.plan.cache is None
    assert not cache.exists()
    with fastgen.load(folder, device="cpu", max_batch_size=1) as model:
        assert model.plan.cache == str(cache)
    assert entry_of(cache)
    monkeypatch.setenv("FASTGEN_CACHE", "off")
    with load(folder, True) as model:
        assert model.plan.cache is None
    with pytest.raises(fastgen.OptionError, match="there is none"):
        load(folder, True, share_weights=True)
    with pytest.raises(fastgen.OptionError, match="there is none"):
        load(folder, False, share_weights=True)
    with pytest.raises(fastgen.OptionError, match="no such home") as caught:
        load(folder, "~nobody-of-this-name/x")
    assert caught.value.option == "cache"


def test_its_size_is_told_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, expected in (("", 8192), ("10", 10), ("0", 0), ("-1", 8192), ("1e3", 8192)):
        monkeypatch.setenv("FASTGEN_CACHE_SIZE", told)
        assert default_max_bytes() == expected * 2**20
