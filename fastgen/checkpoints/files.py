"""The weight files of one folder, opened without trusting them.

The safetensors library parses and checks the headers; this module decides which files may be opened
at all: regular files inside the folder (or blobs of a hub cache), by bare name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # registers "bfloat16" with NumPy, which safetensors needs to read it
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fastgen.checkpoints.identity import Identity, identity_of
from fastgen.errors import CheckpointError, shown, shown_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_TEXT_BYTES = 64 * 2**20
_REPOSITORY = re.compile(r"models--.+")  # its folder in a hub cache
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a small file: Git's SHA-1; else SHA-256


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor; `dtype` is safetensors' name, e.g. "F32"."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFiles:
    """Tensors by their stored names, from model.safetensors or the shards its index lists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        if holds(folder, SINGLE_FILE) or not holds(folder, INDEX_FILE):
            self._add_file(SINGLE_FILE)
        else:
            self._add_shards(read_weight_map(folder))

    def load(self, key: str) -> NDArray[Any]:
        """A copy of the tensor `key`, so that later changes to the file cannot reach it."""
        file = self.infos[key].file
        try:
            with safe_open(self.folder / file, framework="numpy") as opened:
                tensor: NDArray[Any] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: reading {key}: {error}") from error
        return tensor

    def identity(self) -> Identity | None:
        """Which content the files have now; None if they cannot be read."""
        files = sorted({info.file for info in self.infos.values()})
        return identity_of(self.folder / file for file in files)

    def _add_file(self, file: str) -> None:
        path = checked_file(self.folder, file)
        try:
            path.open("rb").close()  # says why it cannot be opened, which the library does not
            with safe_open(path, framework="numpy") as opened:
                _check_unique(path)
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    view = opened.get_slice(key)
                    self._add(key, TensorInfo(file, tuple(view.get_shape()), view.get_dtype()))
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CheckpointError(
                f"{path}: not a valid safetensors file ({size} bytes): {error}"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.infos:
            raise CheckpointError(
                f"{self.folder / info.file}: tensor {key} is also in {self.infos[key].file}"
            )
        self.infos[key] = info

    def _add_shards(self, weight_map: dict[str, str]) -> None:
        for file in sorted(set(weight_map.values())):
            self._add_file(file)
        for key, file in weight_map.items():
            if key not in self.infos or self.infos[key].file != file:
                raise CheckpointError(
                    f"{self.folder / INDEX_FILE}: lists {key} in {file}, which does not hold it"
                )


def read_weight_map(folder: Path) -> dict[str, str]:
    """The index's weight_map, tensor name -> shard name; shard names are bare file names."""
    path = folder / INDEX_FILE
    index = read_json(folder, INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: holds no weight_map from tensor names to shard files")
    for key, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {key} maps to {shown(file)}, not to a .safetensors file"
            )
    return weight_map


def checked_file(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, if that is a regular file that may be read.

    Where a symbolic link may lead, on the way and in the end; everything else is refused:

    1. to a file that lies directly in the folder;
    2. to a file in a subfolder, by links that never leave the folder (Kubernetes' volumes: each
       name is a link into `..data`, itself a link to a subfolder with a date);
    3. from a snapshot in a hub cache (`snapshots/REVISION`) to a blob of the same repository
       (`blobs/`);
    4. from a folder outside of all hub caches to a blob of a model's repository in one
       (`models--NAME/blobs/HASH`), by one link, as the hub's older tools made them in `local_dir`.

    Raises:
        CheckpointError: the name leaves the folder, or the file is missing, a directory, a device.
    """
    if name != Path(name).name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: file name {shown(name)} is not a bare file name")
    path = folder / name
    where = folder / shown_name(name)
    try:
        target = path.resolve(strict=True)
        mode = path.stat().st_mode  # not the target's: the system gives up on long chains of links
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be opened: {_cause(error)}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file")
    home = folder.resolve()
    if target.parent == home or _stays_inside(home, name) or _is_blob_of(home, name, target):
        return path
    raise CheckpointError(f"{path}: is a link that leads out of the folder, to {target}")


def _stays_inside(home: Path, name: str) -> bool:
    """Whether no link on the way from `name` to its file leaves `home`.

    It is followed step by step, and ends: the file has been found before.
    """
    place, ahead = home, [name]  # what is ahead is in reverse
    while ahead:
        part = ahead.pop()
        place = place.parent if part == ".." else place / part
        if not place.is_relative_to(home):
            return False
        if place.is_symlink():
            link, place = place.readlink(), place.parent
            if link.is_absolute():
                if not link.is_relative_to(home):
                    return False
                link, place = link.relative_to(home), home
            ahead.extend(reversed(link.parts))
    return True


def _is_blob_of(home: Path, name: str, target: Path) -> bool:
    """Whether `target` is a hub cache's blob that a link in `home` may lead to."""
    if home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs":
        return True
    if any(_REPOSITORY.fullmatch(part) for part in home.parts):
        return False  # this is a hub cache itself: no other repository is open to it
    link = home / name
    first = home / link.readlink() if link.is_symlink() else link
    is_direct = first.parent.resolve() / first.name == target
    is_blob = target.parent.name == "blobs" and _BLOB.fullmatch(target.name) is not None
    return is_direct and is_blob and _REPOSITORY.fullmatch(target.parent.parent.name) is not None


def holds(folder: Path, name: str) -> bool:
    """Whether there is anything of this name. A broken link counts, so that it is reported."""
    return os.path.lexists(folder / name)


def read_text(folder: Path, name: str) -> str:
    """The text of a file in `folder`: UTF-8, of a sane size, with "\\n" at the end of each line."""
    path = _bounded_file(folder, name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_cause(error)}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error}") from error


def read_json(folder: Path, name: str) -> Any:
    """Parsed JSON of a file in `folder`: UTF-8, no duplicate keys, no NaN, of a sane size."""
    path = _bounded_file(folder, name)
    try:
        return strict_json(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_cause(error)}") from error
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error


def strict_json(text: str | bytes) -> Any:
    """Parsed JSON. Raises ValueError for what is none, has a key twice, or a NaN or infinity."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _bounded_file(folder: Path, name: str) -> Path:
    path = checked_file(folder, name)
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_TEXT_BYTES >> 20} MB")
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {shown(name)} stands twice in one object")
        result[name] = value
    return result


def _check_unique(path: Path) -> None:
    """The format forbids a name twice in a header; the library takes the last of them."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=_unique)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)[:500]
