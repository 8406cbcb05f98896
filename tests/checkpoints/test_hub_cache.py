"""Checkpoints in the hub's cache, where every file is a link into a store of blobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_checkpoints import assert_loads, assert_refused, cases, run_python, write_checkpoint

REVISION = "0123456789abcdef0123456789abcdef01234567"
_LOAD_BY_ID = """
import sys, fastgen
try:
    with fastgen.load(*sys.argv[1:2], revision=(sys.argv[2:] or [None])[0], device="cpu") as model:
        [generation] = model.generate([1, 2], max_new_tokens=2, ignore_eos=True)
    print(len(generation.completions[0].token_ids), "tokens")
except fastgen.CheckpointError as error:
    print(error)
"""


def write_hub_cache(cache: Path) -> Path:
    """A checkpoint as huggingface_hub keeps it: links into a store of blobs. Returns its folder."""
    repo = cache / "models--someone--tiny"
    snapshot = repo / "snapshots" / REVISION
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    written = write_checkpoint(cache / "written")
    for number, file in enumerate(sorted(written.iterdir())):
        blob = file.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_hub_cache_folder_loads(tmp_path: Path) -> None:
    snapshot = write_hub_cache(tmp_path)
    assert (snapshot / "config.json").is_symlink()
    assert_loads(snapshot)


@pytest.mark.parametrize(("arguments", "answer"), cases({
    "main": (["someone/tiny"], "2 tokens"),
    "revision": (["someone/tiny", REVISION], "2 tokens"),
    "unknown revision": (["someone/tiny", "other"], "someone/tiny: no such folder here, not in"),
    "unknown id": (["someone/else"], "someone/else: no such folder here, not in the hub's cache"),
}))  # fmt: skip
def test_hub_id_from_the_cache(tmp_path: Path, arguments: list[str], answer: str) -> None:
    write_hub_cache(tmp_path)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    assert answer in run_python(_LOAD_BY_ID, *arguments, **settings)


@pytest.mark.parametrize("target", ["../../../models--someone--else/blobs/0", "../../0", "../0"])
def test_hub_cache_link_elsewhere(tmp_path: Path, target: str) -> None:
    """Only the blobs of the same repository are open to a snapshot."""
    weights = write_hub_cache(tmp_path) / "model.safetensors"
    other = weights.parent / target
    (tmp_path / "models--someone--else" / "blobs").mkdir(parents=True)
    shutil.copy(weights, other)
    weights.unlink()
    weights.symlink_to(target)
    assert_refused(weights.parent, "model.safetensors: is a link that leads out of the folder")


def test_hub_cache_blob_that_is_a_link(tmp_path: Path) -> None:
    weights = write_hub_cache(tmp_path) / "model.safetensors"
    blob = weights.resolve()
    blob.symlink_to(blob.rename(tmp_path / "outside"))
    assert_refused(weights.parent, "model.safetensors: is a link that leads out of the folder")
