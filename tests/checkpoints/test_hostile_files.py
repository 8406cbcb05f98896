"""Checkpoint folders whose files are not what they seem: shards, links, devices, FIFOs.

Nothing outside the folder is read, and nothing can make the load hang.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from fastgen.errors import CheckpointError
from tiny_checkpoints import (
    TOKENIZER,
    assert_loads,
    assert_names,
    assert_refused,
    cases,
    load,
    random_tensors,
    refusals,
    write_checkpoint,
    write_config,
    write_index,
    write_json,
    write_shards,
    write_vocabulary,
)

INDEX = "model.safetensors.index.json"


def split_tensors() -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors, in two parts."""
    tensors = random_tensors()
    first = {name: tensors.pop(name) for name in list(tensors)[:5]}
    return first, tensors


def test_good_shards_load(tmp_path: Path) -> None:
    """What the cases below start from is not what they fail on."""
    write_index(tmp_path, write_shards(tmp_path, *split_tensors()))
    assert_loads(tmp_path)


def test_shard_missing(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path, *split_tensors()))
    (tmp_path / "1.safetensors").unlink()
    assert_refused(tmp_path, "1.safetensors: cannot be opened: No such file")


def test_shard_truncated(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path, *split_tensors()))
    whole = (tmp_path / "1.safetensors").read_bytes()
    (tmp_path / "1.safetensors").write_bytes(whole[:-1])
    assert_refused(tmp_path, "1.safetensors: not a valid safetensors file", "not fully covered")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    first, second = split_tensors()
    second["wte.weight"] = first["wte.weight"]
    write_index(tmp_path, write_shards(tmp_path, first, second))
    assert_refused(tmp_path, "1.safetensors: tensor wte.weight is also in 0.safetensors")


def test_tensor_in_two_shards_under_two_names(tmp_path: Path) -> None:
    first, second = split_tensors()
    second["transformer.wte.weight"] = first["wte.weight"]
    write_index(tmp_path, write_shards(tmp_path, first, second))
    assert_refused(tmp_path, "1.safetensors: tensor wte.weight is stored twice")


@pytest.mark.parametrize("name", ["wte.weight", "nowhere.weight"])
def test_tensor_listed_in_the_wrong_shard(tmp_path: Path, name: str) -> None:
    weight_map = write_shards(tmp_path, *split_tensors())
    write_index(tmp_path, {**weight_map, name: "1.safetensors"})
    assert_refused(tmp_path, f"{INDEX}: lists {name} in 1.safetensors, which does not hold it")


def test_shards_complete_but_for_one_tensor(tmp_path: Path) -> None:
    first, second = split_tensors()
    del second["ln_f.bias"]
    write_index(tmp_path, write_shards(tmp_path, first, second))
    assert_refused(tmp_path, "tensor ln_f.bias is missing")


BARE, SHARD = "is not a bare file name", "not to a .safetensors file"
NAMES = {
    "parent": ("../x.safetensors", BARE),
    "down and up": ("a/../../x.safetensors", BARE),
    "absolute": ("{outside}/x.safetensors", BARE),
    "subfolder": ("a/x.safetensors", BARE),
    "this folder": ("./x.safetensors", BARE),
    "trailing slash": ("x.safetensors/", SHARD),
    "doubled slash": ("//x.safetensors", BARE),
    "backslash": ("a\\x.safetensors", BARE),
    "backslash up": ("..\\x.safetensors", BARE),
    "drive": ("C:\\x.safetensors", BARE),
    "NUL": ("x.safetensors\0.safetensors", BARE),
    "NUL at the end": ("x.safetensors\0", SHARD),
    "empty": ("", SHARD),
    "dot": (".", SHARD),
    "dots": ("..", SHARD),
    "bin": ("x.bin", SHARD),
    "config": ("config.json", SHARD),
    "URL": ("https://localhost/x.safetensors", BARE),
    "long": (f"{'x' * 300}.safetensors", "File name too long"),
    "endless": (f"{'x' * 10**5}.safetensors", "File name too long"),
    "endless wrong": ("x" * 10**5, SHARD),
    "lone surrogate": ("\ud800.safetensors", "safetensors"),
}


@pytest.mark.parametrize(("name", "cause"), cases(NAMES))
def test_shard_name(tmp_path: Path, name: str, cause: str) -> None:
    """Wherever a shard name could lead to lies a good file: only the check keeps it out."""
    folder, outside = tmp_path / "model", tmp_path
    (folder / "a").mkdir(parents=True)
    write_config(folder)
    for place in (outside, folder, folder / "a"):
        save_file(random_tensors(), place / "x.safetensors")
    for odd in ("a\\x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "x.bin"):
        save_file(random_tensors(), folder / odd)
    write_index(folder, dict.fromkeys(random_tensors(), name.format(outside=outside)))
    assert_refused(folder, cause)


NO_MAP = f"{INDEX}: holds no weight_map"
INDEXES = {
    "empty file": ("", f"{INDEX}: is not valid JSON"),
    "not JSON": ("weights", f"{INDEX}: is not valid JSON"),
    "not UTF-8": ('{"weight_map": "\xff"}', f"{INDEX}: is not valid JSON"),
    "array": ("[]", NO_MAP),
    "null": ("null", NO_MAP),
    "no map": ('{"metadata": {}}', NO_MAP),
    "null map": ('{"weight_map": null}', NO_MAP),
    "list": ('{"weight_map": ["0.safetensors"]}', NO_MAP),
    "string": ('{"weight_map": "0.safetensors"}', NO_MAP),
    "empty map": ('{"weight_map": {}}', NO_MAP),
    "null shard": ('{"weight_map": {"wte.weight": null}}', f"maps to None, {SHARD}"),
    "number shard": ('{"weight_map": {"wte.weight": 5}}', f"maps to 5, {SHARD}"),
    "true shard": ('{"weight_map": {"wte.weight": true}}', f"maps to True, {SHARD}"),
    "list shard": ('{"weight_map": {"wte.weight": ["0"]}}', f"maps to ['0'], {SHARD}"),
    "object shard": ('{"weight_map": {"wte.weight": {"a": 1}}}', f"maps to {{'a': 1}}, {SHARD}"),
    "deep": ('{"weight_map": ' + "[" * 10**5, f"{INDEX}: is nested too deeply"),
    "key twice": ('{"weight_map": {"wte.weight": "a", "wte.weight": "b"}}',
                  "key 'wte.weight' stands twice"),
    "map twice": ('{"weight_map": {}, "weight_map": {}}', "key 'weight_map' stands twice"),
    "NaN": ('{"metadata": {"total_size": NaN}, "weight_map": {}}', "NaN is not a JSON number"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "cause"), cases(INDEXES))
def test_malformed_index(tmp_path: Path, text: str, cause: str) -> None:
    write_shards(tmp_path, random_tensors())
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    assert_refused(tmp_path, cause)


VOCABULARY_FILES = [
    *("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    "added_tokens.json",
]


def special_folder(folder: Path, file: str) -> Path:
    """A good checkpoint in which `file` is there and will be read; returns the file."""
    if file in ("0.safetensors", INDEX):
        write_index(folder, write_shards(folder, random_tensors()))
    else:
        write_checkpoint(folder)
    if file in VOCABULARY_FILES:
        write_vocabulary(folder)
        for settings in VOCABULARY_FILES[2:]:
            write_json(folder / settings, {})
    else:
        write_json(folder / "tokenizer.json", TOKENIZER)
    if file in ("vocab.txt", "spiece.model"):
        (folder / "tokenizer.json").rename(folder / file)
    if file == "generation_config.json":
        write_json(folder / file, {"eos_token_id": 0})
    return folder / file


def lead_out(path: Path) -> None:
    path.symlink_to(path.rename(path.parent.parent / f"outside-{path.parent.name}"))


def lead_out_twice(path: Path) -> None:
    outside = path.rename(path.parent.parent / f"outside-{path.parent.name}")
    (path.parent / "inner").symlink_to(outside)
    path.symlink_to("inner")


def replace(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replaced(path: Path) -> None:
        path.unlink()
        make(path)

    return replaced


# The kind that could hang comes last: those before it have been told by then.
SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "directory": (replace(Path.mkdir), "is not a regular file"),
    "out": (lead_out, "is a link that leads out of the folder"),
    "out-twice": (lead_out_twice, "is a link that leads out of the folder"),
    "proc": (replace(lambda path: path.symlink_to("/proc/self/status")), "leads out"),
    "null": (replace(lambda path: path.symlink_to("/dev/null")), "is not a regular file"),
    "loop": (replace(lambda path: path.symlink_to(path.name)), "cannot be opened"),
    "broken": (replace(lambda path: path.symlink_to("gone")), "cannot be opened: No such file"),
    "zero": (replace(lambda path: path.symlink_to("/dev/zero")), "is not a regular file"),
    "FIFO": (replace(os.mkfifo), "is not a regular file"),
}
READ_FILES = [
    *("config.json", "model.safetensors", INDEX, "0.safetensors", "generation_config.json"),
    *("tokenizer.json", *VOCABULARY_FILES, "vocab.txt", "spiece.model"),
]


@pytest.fixture(scope="module")
def special_refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path | str]:
    """What is said of each file (second) that is of a special kind (first)."""
    root = tmp_path_factory.mktemp("special")
    told: dict[tuple[str, str], Path | str] = {}
    for kind in SPECIAL:
        for file in READ_FILES:
            path = special_folder(root / f"{kind}-{file}", file)
            SPECIAL[kind][0](path)
            told[kind, file] = path.parent
    messages: Iterator[str] = iter(refusals(*map(Path, told.values())))
    return {key: next(messages, f"{told[key]}: no answer") for key in told}


@pytest.mark.parametrize("file", READ_FILES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_file(special_refusals: dict[tuple[str, str], str], kind: str, file: str) -> None:
    assert_names(special_refusals[kind, file], f"{kind}-{file}/{file}: ", SPECIAL[kind][1])


def test_links_within_the_folder_load(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "model" / "weights").name)
    (tmp_path / "link").symlink_to("model")
    assert_loads(tmp_path / "model")
    assert_loads(tmp_path / "link")


def write_volume(folder: Path) -> Path:
    """A checkpoint as Kubernetes mounts it: each file is a link into `..data`, which is a link to
    the subfolder of the newest version. Returns that."""
    version = write_checkpoint(folder / "..2026_01_01_00_00_00.1")
    write_json(version / "tokenizer.json", TOKENIZER)
    (folder / "..data").symlink_to(version.name)
    for file in version.iterdir():
        (folder / file.name).symlink_to(Path("..data") / file.name)
    return version


def test_links_into_a_subfolder_load(tmp_path: Path) -> None:
    version = write_volume(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    assert_loads(tmp_path / "model")
    assert_loads(tmp_path / "link")
    weights = tmp_path / "model" / "model.safetensors"
    for target in ("./..data/../..data/" + weights.name, version / weights.name):
        weights.unlink()
        weights.symlink_to(target)
        assert_loads(tmp_path / "model")


def move(path: Path, place: Path) -> Path:
    path.rename(place)
    return place


def send_out_and_back(model: Path, outside: Path) -> None:
    (outside / "back").symlink_to(model / "..data" / "model.safetensors")
    (model / "model.safetensors").symlink_to(outside / "back")


def send_up_and_down(model: Path, outside: Path) -> None:
    (model / "model.safetensors").symlink_to(f"../{model.name}/..data/model.safetensors")


def send_the_subfolder_out_and_back(model: Path, outside: Path) -> None:
    (outside / "back").symlink_to((model / "..data").resolve())
    (model / "..data").unlink()
    (model / "..data").symlink_to(outside / "back")
    (model / "model.safetensors").symlink_to("..data/model.safetensors")


def send_the_subfolder_out(model: Path, outside: Path) -> None:
    version = move((model / "..data").resolve(), outside / "version")
    (model / "..data").unlink()
    (model / "..data").symlink_to(version)
    (model / "model.safetensors").symlink_to("..data/model.safetensors")


def send_out_from_the_subfolder(model: Path, outside: Path) -> None:
    inner = model / "..data" / "model.safetensors"
    inner.symlink_to(move(inner, outside / "weights"))
    (model / "model.safetensors").symlink_to("..data/model.safetensors")


def send_to_a_namesake(model: Path, outside: Path) -> None:
    """Its path begins like the folder's."""
    namesake = write_checkpoint(model.with_name(model.name + "-2"))
    (model / "model.safetensors").symlink_to(namesake / "model.safetensors")


ROUNDABOUT = [
    send_out_and_back, send_up_and_down, send_the_subfolder_out_and_back, send_the_subfolder_out,
    send_out_from_the_subfolder, send_to_a_namesake,
]  # fmt: skip


@pytest.mark.parametrize("send", ROUNDABOUT)
def test_link_that_leaves_the_folder_on_its_way(
    tmp_path: Path, send: Callable[[Path, Path], None]
) -> None:
    """Wherever it ends: what lies outside is in others' hands."""
    model, outside = tmp_path / "model", tmp_path / "outside"
    write_volume(model)
    outside.mkdir()
    (model / "model.safetensors").unlink()
    send(model, outside)
    assert_refused(model, ": is a link that leads out of the folder")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_chain_of_links_too_long_for_the_system(tmp_path: Path, file: str) -> None:
    path = write_checkpoint(tmp_path) / file
    path.rename(tmp_path / "0")
    for number in range(100):
        (tmp_path / f"{number + 1}").symlink_to(f"{number}")
    path.symlink_to("100")
    assert_refused(tmp_path, f"{file}: cannot be opened: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_unreadable(tmp_path: Path, file: str) -> None:
    folder = special_folder(tmp_path / "model", "tokenizer.json").parent
    (folder / file).chmod(0)
    try:
        assert_refused(folder, "ermission denied")
    finally:
        (folder / file).chmod(0o700)


def test_model_is_a_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    assert_refused(path, "is a file; give the folder it lies in")


@pytest.mark.parametrize("name", cases({
    "absolute": "/nowhere/at/all",
    "relative": "../nowhere/at/all",
    "NUL": "no\0where",
    "dots": "...",
    "lone surrogate": "\ud800/model",
    "long": "x" * 5000 + "/y",
    "unknown home": "~nobody-of-this-name/model",
}))  # fmt: skip
def test_model_is_nowhere(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert str(caught.value).startswith(name[:50])
    assert "no such folder" in str(caught.value)
