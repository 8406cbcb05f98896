"""pack(): a folder with weights as the CPU decoder packs them, to be shipped and loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.files import checked_file, holds, read_json
from fastgen.checkpoints.packed import PACKED_FILE
from fastgen.checks import wrong_type, wrong_value
from fastgen.decoders.cpu.plan import write_packed_weights
from fastgen.decoders.plan import LoadOptions
from fastgen.frontends.generator import find_tokenizer, open_model
from fastgen.text.tokenizer_files import TOKENIZER_FILES

_COPIED = ("generation_config.json", *TOKENIZER_FILES)


def pack(
    model: str | Path | None,
    out: str | Path,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    num_threads: int | None = None,
    revision: str | None = None,
) -> Path:
    """Write a folder that `load` reads without packing: it has config.json, the tokenizer's files,
    and the weights as the CPU decoder keeps them. Tokens are those of the checkpoint itself, loaded
    with the same `dtype` and `quantize`.

    Args:
        model: a folder or a hub id; None is the model that ships with fastgen.
        out: the folder; made if it is not there, and empty if it is.
        dtype, quantize, num_threads, revision: as of `load`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint cannot be read, or cannot be run exactly, or is packed.
        OptionTypeError, OptionError: an option is wrong, or cannot be met.
        OSError: the folder cannot be written; nothing is left in it then.
    """
    folder = _checked_out(out)
    options = LoadOptions(decoder="cpu", dtype=dtype, quantize=quantize, num_threads=num_threads)
    if not (model is None or isinstance(model, (str, Path))):
        raise wrong_type("model", f"must be a folder or a hub id, not {type(model).__name__}")
    checkpoint = open_model(model, revision)
    if checkpoint.packed is not None:
        raise wrong_value("model", f"{checkpoint.name} is packed already")
    find_tokenizer(checkpoint, model)  # raises for what `load` would refuse
    with _written_whole(folder) as scratch:
        _write_config(checkpoint, scratch)
        _copy_files(checkpoint, scratch)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = os.open(scratch / PACKED_FILE, flags, 0o666)
        try:
            write_packed_weights(checkpoint, options, file)
            os.fsync(file)
        finally:
            os.close(file)
    return folder


def _checked_out(out: Any) -> Path:
    if not isinstance(out, (str, Path)):
        raise wrong_type("out", f"must be a folder, not {type(out).__name__}")
    if str(out) == "":
        raise wrong_value("out", "must name a folder")
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise wrong_value("out", f"must be a new or an empty folder, and {folder} is not")
    return folder


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder whose files are `folder`'s if all goes well. One that is there already may be the
    place of a mount, or a link: then they are moved into it, the weights last."""
    name = f".{folder.name}.{os.urandom(8).hex()}"
    is_there = folder.is_dir()
    scratch = folder / name if is_there else folder.absolute().parent / name
    scratch.mkdir(parents=True)
    moved: list[Path] = []
    try:
        yield scratch
        if not is_there:
            scratch.rename(folder)
            return
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == PACKED_FILE):
            moved.append(folder / path.name)
            path.rename(moved[-1])
        scratch.rmdir()
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write_config(checkpoint: Checkpoint, to: Path) -> None:
    """The checkpoint's own, but whether the head is tied, as the tensors say."""
    assert checkpoint.folder is not None
    config = read_json(checkpoint.folder, "config.json")
    config["tie_word_embeddings"] = checkpoint.tied
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_files(checkpoint: Checkpoint, to: Path) -> None:
    assert checkpoint.folder is not None
    for name in _COPIED:
        if holds(checkpoint.folder, name):
            shutil.copyfile(checked_file(checkpoint.folder, name), to / name)
