"""A folder of packed weights: what is in it, that it is the model, and what it is refused for."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen.checkpoints.packed import PACKED_FILE
from fastgen.native import native
from packed_files import load, tokens_of, weights_of
from tiny_checkpoints import TOKENIZER, write_checkpoint, write_json

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int8 float32": {"quantize": "int8", "dtype": "float32"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    return fastgen.pack(folder, tmp_path / "packed", quantize="int8")


def test_the_bundled_model_says_the_same(model: fastgen.Generator, tmp_path: Path) -> None:
    """Text in and out: the tokenizer goes along."""
    out = fastgen.pack(None, tmp_path / "packed")
    options: dict[str, Any] = {"temperature": 0.8, "seed": 1, "max_new_tokens": 20}
    with fastgen.load(out) as packed:
        assert packed("In the beginning", **options) == model("In the beginning", **options)
        assert packed.config == model.config and packed.plan.weights == model.plan.weights
        [score] = packed.score(["Let there be light"])
    assert score == model.score(["Let there be light"])[0]


def test_the_folder_holds_all_that_a_model_needs(folder: Path, tmp_path: Path) -> None:
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "generation_config.json", {"eos_token_id": 3})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("README.md", "pytorch_model.bin", "modeling_gpt2.py"):
        (folder / name).write_text("")
    out = fastgen.pack(str(folder), str(tmp_path / "new" / "packed"))
    assert out == tmp_path / "new" / "packed"
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", PACKED_FILE),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert [path.name for path in out.parent.iterdir()] == ["packed"]
    with load(out, False) as packed, load(folder, False) as model:
        assert packed.config == model.config and packed.config.eos_token_ids == (3,)
        assert packed.tokenizer is not None and model.tokenizer is not None
        assert packed.tokenizer.chat_template == model.tokenizer.chat_template
        assert weights_of(packed) == weights_of(model) and tokens_of(packed) == tokens_of(model)


@pytest.mark.parametrize("how", ["empty", "link", "here"])
def test_a_folder_that_is_there_is_filled(
    how: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the place of a mount, which cannot be replaced."""
    there = tmp_path / "there"
    there.mkdir()
    inode = there.stat().st_ino
    out: Path = there
    if how == "link":
        out = tmp_path / "link"
        out.symlink_to(there)
    if how == "here":
        monkeypatch.chdir(there)
        out = Path(".")
    fastgen.pack(folder, out)
    assert there.stat().st_ino == inode and not list(there.glob(".*"))
    with load(there, False) as packed, load(folder, False) as model:
        assert tokens_of(packed) == tokens_of(model)


def test_a_folder_that_was_there_is_empty_after_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Path, target: Path) -> Path:
        if target.name == PACKED_FILE:
            raise OSError("boom")
        return original(self, target)

    original = Path.rename
    monkeypatch.setattr(Path, "rename", broken)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="boom"):
        fastgen.pack(folder, out)
    assert list(out.iterdir()) == []


def test_what_the_head_is_is_kept(variant: Callable[[str], Path], tmp_path: Path) -> None:
    """Where the config says one thing and the tensors another, too."""
    for name in ("plain", "untied", "swapped_head", "both_heads_equal", "both_heads_differ"):
        out = fastgen.pack(variant(name), tmp_path / name)
        tied = name in ("plain", "swapped_head", "both_heads_equal")
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
        with load(out, False) as packed, load(variant(name), False) as model:
            assert weights_of(packed) == weights_of(model) and tokens_of(packed) == tokens_of(model)


def test_others_may_read_it_as_the_umask_says(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = fastgen.pack(folder, tmp_path / "packed")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert stat.S_IMODE((out / PACKED_FILE).stat().st_mode) == 0o640


@pytest.mark.parametrize("name", OPTIONS)
def test_what_it_was_not_packed_for_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    out, own = fastgen.pack(folder, tmp_path / "packed", **OPTIONS[name]), OPTIONS[name]
    for options in OPTIONS.values():
        same = own == options
        if own.get("quantize") and not options.get("quantize"):  # it is what is packed, unsaid
            same = options["dtype"] == own.get("dtype", "bfloat16")
        if own.get("quantize") and not options.get("dtype"):
            same = True
        if same:
            load(out, False, **options).close()
            continue
        with pytest.raises(fastgen.OptionError, match="was packed with") as caught:
            load(out, False, **options)
        assert caught.value.option in ("dtype", "quantize")


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"decoder": "torch"}, "decoder"),
        ({"decoder": "cuda"}, "decoder"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_other_decoders_do_not_read_it(options: dict[str, Any], option: str, packed: Path) -> None:
    with pytest.raises(fastgen.OptionError) as caught:
        load(packed, False, **options)
    assert caught.value.option == option


def test_it_is_a_model_like_any_other(packed: Path, folder: Path, tmp_path: Path) -> None:
    """As a draft model, and with a cache, which it does not need."""
    with (
        load(packed, tmp_path / "cache", draft_model=packed) as model,
        load(folder, False, quantize="int8") as plain,
    ):
        assert tokens_of(model) == tokens_of(plain) and model.plan.cache is None
    assert not (tmp_path / "cache").exists()


def test_two_kinds_of_weights_in_a_folder_are_refused(packed: Path, folder: Path) -> None:
    (folder / "model.safetensors").rename(packed / "model.safetensors")
    with pytest.raises(fastgen.CheckpointError, match="may be of two models"):
        load(packed, False)


@pytest.mark.parametrize("out", ["full", "file", "model"])
def test_only_a_new_or_empty_folder_is_written(out: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(fastgen.OptionError, match="new or an empty folder") as caught:
        fastgen.pack(folder, tmp_path / out)
    assert caught.value.option == "out" and sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    load(fastgen.pack(folder, tmp_path / "empty"), False).close()


Pack = Callable[[Path, Path], Any]
WRONG: dict[str, tuple[Pack, type[Exception], str]] = {
    "no model": (
        lambda f, out: fastgen.pack(f / "nowhere", out), fastgen.CheckpointError, "no such",
    ),
    "a model in memory": (lambda f, out: fastgen.pack(f.stat, out), TypeError, "model"),  # type: ignore[arg-type]
    "no folder": (lambda f, out: fastgen.pack(f, ""), ValueError, "out"),
    "no name": (lambda f, out: fastgen.pack(f, 3), TypeError, "out"),  # type: ignore[arg-type]
    "a dtype": (lambda f, out: fastgen.pack(f, out, dtype="int3"), ValueError, "dtype"),
    "both": (
        lambda f, out: fastgen.pack(f, out, dtype="float16", quantize="int8"), ValueError, "dtype",
    ),
    "packed": (lambda f, out: fastgen.pack(fastgen.pack(f, out), out / "x"), ValueError, "already"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_leave_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    wrong, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        wrong(folder, tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()} - {"model"}
    assert left == ({"out"} if name == "packed" else set())


def test_a_disk_that_is_full_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fastgen.checkpoints.packed.os.write", full)
        with pytest.raises(OSError, match="No space left"):
            fastgen.pack(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
