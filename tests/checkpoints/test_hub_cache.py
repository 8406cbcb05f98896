"""Checkpoints in the hub's cache, where every file is a link into a store of blobs."""

from __future__ import annotations

import os
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


def write_local_dir(folder: Path, cache: Path) -> Path:
    """A checkpoint as huggingface_hub before 0.23 wrote `local_dir`: large files are links into the
    cache's blobs, relative ones. Returns the blob of the weights."""
    snapshot = write_hub_cache(cache)
    folder.mkdir(parents=True)
    shutil.copy(snapshot / "config.json", folder)
    blob = (snapshot / "model.safetensors").resolve()
    link_to(folder, os.path.relpath(blob, folder))
    return blob


def link_to(folder: Path, target: Path | str) -> Path:
    """Make model.safetensors in `folder` a link to `target`, whatever it was."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to(target)
    return folder


def test_local_dir_with_links_into_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    blob = write_local_dir(folder, tmp_path / "cache")
    assert_loads(folder)
    assert_loads(link_to(folder, blob))  # it was absolute where the two had no folder in common
    (tmp_path / "alias").symlink_to("cache")
    assert_loads(link_to(folder, "../alias/models--someone--tiny/blobs/" + blob.name))


def test_local_dir_with_the_blob_of_a_small_file(tmp_path: Path) -> None:
    blob = write_local_dir(tmp_path / "model", tmp_path / "cache")
    assert_loads(link_to(tmp_path / "model", blob.rename(blob.with_name("a" * 40))))


# Where a link in a folder outside of hub caches may not lead, though the file is a good one.
NO_BLOBS = {
    "no repository": "cache/blobs/{hash}",
    "a data set's": "cache/datasets--someone--tiny/blobs/{hash}",
    "below the blobs": "cache/models--someone--tiny/blobs/more/{hash}",
    "beside the blobs": "cache/models--someone--tiny/{hash}",
    "no hash": "cache/models--someone--tiny/blobs/weights",
    "too short a hash": "cache/models--someone--tiny/blobs/{hash:.63}",
    "a snapshot's file": "cache/models--someone--tiny/snapshots/a/model.safetensors",
    "elsewhere": "secret",
}


@pytest.mark.parametrize("place", NO_BLOBS.values(), ids=NO_BLOBS)
def test_local_dir_link_to_no_blob(tmp_path: Path, place: str) -> None:
    blob = write_local_dir(tmp_path / "model", tmp_path / "cache")
    target = tmp_path / place.format(hash=blob.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(blob, target)
    folder = link_to(tmp_path / "model", target)
    assert_refused(folder, "model.safetensors: is a link that leads out of the folder")


def test_local_dir_link_to_a_blob_by_way_of_another(tmp_path: Path) -> None:
    blob = write_local_dir(tmp_path / "model", tmp_path / "cache")
    (tmp_path / "outside").symlink_to(blob)
    folder = link_to(tmp_path / "model", tmp_path / "outside")
    assert_refused(folder, "model.safetensors: is a link that leads out of the folder")


def test_local_dir_link_to_a_blob_that_is_a_link(tmp_path: Path) -> None:
    blob = write_local_dir(tmp_path / "model", tmp_path / "cache")
    blob.symlink_to(blob.rename(tmp_path / "outside"))
    assert_refused(tmp_path / "model", "model.safetensors: is a link that leads out of the folder")


@pytest.mark.parametrize("absolute", [False, True])
def test_hub_cache_link_to_a_sibling_snapshot(tmp_path: Path, absolute: bool) -> None:
    """Only to a file that is no blob of the repository is it a way out."""
    snapshot = write_hub_cache(tmp_path)
    other = snapshot.parent / "other"
    other.mkdir()
    shutil.copy(snapshot / "model.safetensors", other)
    target = other / "model.safetensors" if absolute else "../other/model.safetensors"
    link_to(snapshot, target)
    assert_refused(snapshot, "model.safetensors: is a link that leads out of the folder")


@pytest.mark.parametrize("place", ["", "below"])
def test_hub_cache_link_to_another_repository(tmp_path: Path, place: str) -> None:
    """Well-made blobs of others, too, are closed to a snapshot, and to a folder below it."""
    snapshot = write_hub_cache(tmp_path)
    other = tmp_path / "models--someone--else" / "blobs" / ("b" * 64)
    other.parent.mkdir(parents=True)
    (snapshot / place).mkdir(exist_ok=True)
    if place:
        shutil.copy(snapshot / "config.json", snapshot / place)
    shutil.copy(snapshot / "model.safetensors", other)
    folder = link_to(snapshot / place, other)
    assert_refused(folder, "model.safetensors: is a link that leads out of the folder")
