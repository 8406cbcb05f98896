"""A checkpoint: GPT-2's tensors by their canonical names, checked before anything is built.

tensor_names.py says what a canonical name is.
Projection weights keep Conv1D's layout, (in, out).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgen.checkpoints.config import GPT2Config
from fastgen.checkpoints.files import (
    INDEX_FILE,
    NUMPY_DTYPES,
    SINGLE_FILE,
    SafetensorsFiles,
    TensorInfo,
    holds,
    read_json,
)
from fastgen.checkpoints.identity import Identity
from fastgen.checkpoints.packed import PACKED_FILE, PackedWeights
from fastgen.checkpoints.tensor_names import (
    EMBEDDING,
    HEAD,
    canonical_name,
    expected_shapes,
    find_prefix,
    is_harmless,
    refused_part,
)
from fastgen.checks import wrong_type
from fastgen.errors import CheckpointError, shown_name

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_SUBFOLDERS = ["*/*"]


class TensorSource(Protocol):
    """Where tensors come from: files, or a model in memory."""

    infos: dict[str, TensorInfo]

    def load(self, key: str) -> NDArray[Any]: ...

    def identity(self) -> Identity | None: ...


class Checkpoint:
    """Checked tensors and config of one GPT-2; `read` gives one tensor at a time.

    Attributes:
        name: what the user called it, for messages.
        folder: where its files lie; None for a model in memory.
        config: shape and variant, with eos and pad ids from generation_config.json.
        tied: whether the head is the embedding itself.
        dtype: the dtype most of the weights are stored in, "float32", "float16" or "bfloat16".
        packed: in place of tensors, the weights as a decoder has packed them; `read` raises then.
    """

    def __init__(
        self, source: TensorSource, config: GPT2Config, name: str, folder: Path | None = None
    ) -> None:
        self._source, self.config, self.name, self.folder = source, config, name, folder
        self.packed = source if isinstance(source, PackedWeights) else None
        self._keys = _canonical_keys(source.infos, name)
        self._check_refused()
        self.tied = self._decide_head()
        self._check_tensors()
        sizes: Counter[str] = Counter()
        for _, info in self.tensors():
            sizes[_DTYPE_NAMES[info.dtype]] += int(np.prod(info.shape))
        self.dtype = sizes.most_common(1)[0][0]

    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """Name and header of each tensor the model is built from."""
        for name in expected_shapes(self.config, tied=self.tied):
            yield name, self._source.infos[self._keys[name]]

    def identity(self) -> Identity | None:
        """Which content the tensors have now, told without reading them; None: it cannot be."""
        return self._source.identity()

    def read(self, name: str) -> NDArray[Any]:
        """The tensor `name` in its stored dtype.

        Raises:
            CheckpointError: it holds NaN or infinity, or the file cannot be read any more.
        """
        tensor = self._source.load(self._keys[name])
        info = self._source.infos[self._keys[name]]
        if tensor.shape != info.shape or tensor.dtype != NUMPY_DTYPES[info.dtype]:
            raise self._error(name, "has changed since the checkpoint was opened")
        if not _all_finite(tensor):
            raise self._error(name, "holds NaN or infinite values")
        return tensor

    def _error(self, name: str, cause: str) -> CheckpointError:
        key = self._keys.get(name)
        where = f"{self.name}/{self._source.infos[key].file}" if key else self.name
        return CheckpointError(f"{where}: tensor {shown_name(key or name)} {cause}")

    def _check_refused(self) -> None:
        for name in self._keys:
            if (part := refused_part(name)) is not None:
                raise self._error(name, f"belongs to {part}, which cannot be run exactly")
        if (found := find_prefix(self._keys)) is not None:
            name, prefix = found
            raise self._error(
                name,
                f"has the prefix {prefix}, which GPT-2's names have not; "
                "save the model without what was put around it",
            )

    def _decide_head(self) -> bool:
        """Whether the head is tied, by transformers' rules.

        With only a head, the embedding is tied to it. Both present but different stay apart,
        whatever the config says. Untied by the config and no head: nothing to run with.
        """
        has_head, has_embedding = HEAD in self._keys, EMBEDDING in self._keys
        if has_head and not has_embedding and self.config.tie_word_embeddings:
            self._keys[EMBEDDING] = self._keys[HEAD]
            return True
        if not has_head:
            if not self.config.tie_word_embeddings:
                raise CheckpointError(
                    f"{self.name}: tie_word_embeddings is false, but tensor {HEAD} is missing"
                )
            return True
        if not (self.config.tie_word_embeddings and has_embedding):
            return False
        head, embedding = (self._source.infos[self._keys[name]] for name in (HEAD, EMBEDDING))
        if head[1:] != embedding[1:] or head.dtype not in NUMPY_DTYPES:
            return False
        return self._digest(HEAD) == self._digest(EMBEDDING)

    def _digest(self, name: str) -> bytes:
        """Of a tensor's bytes: two of them are compared with one in memory at a time."""
        raw = np.ascontiguousarray(self._source.load(self._keys[name])).reshape(-1)
        return hashlib.blake2b(raw.view(np.uint8).data).digest()

    def _check_tensors(self) -> None:
        stored_layers = {name.split(".")[1] for name in self._keys if name.startswith("h.")}
        if self.config.num_layers > len(stored_layers):
            raise CheckpointError(
                f"{self.name}: config.json says n_layer {self.config.num_layers}, "
                f"but the weights hold {len(stored_layers)} layers"
            )
        shapes = expected_shapes(self.config, tied=self.tied)
        for name, shape in shapes.items():
            if name not in self._keys:
                known = ", ".join(map(shown_name, sorted(self._source.infos)[:3]))
                raise self._error(name, f"is missing (the file holds {known}, ...)")
            info = self._source.infos[self._keys[name]]
            if info.shape != shape:
                raise self._error(name, f"has shape {info.shape}, config.json implies {shape}")
            if info.dtype not in NUMPY_DTYPES:
                raise self._error(
                    name, f"has dtype {info.dtype}; float32, float16 and bfloat16 can be run"
                )
        self._check_extra(sorted(self._keys.keys() - shapes.keys() - {HEAD}))

    def _check_extra(self, extra: list[str]) -> None:
        """Refuse what may change the model; warn of what is left out."""
        for name in extra:
            if not is_harmless(name):
                raise self._error(
                    name, "is of no part that GPT-2 has: the model cannot be run exactly"
                )
        if extra:
            listed = ", ".join(map(shown_name, extra[:5])) + (", ..." if len(extra) > 5 else "")
            warnings.warn(f"{self.name}: {len(extra)} tensors are not used: {listed}", stacklevel=7)


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local folder, or a hub id through huggingface_hub's cache.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    folder = _resolve_folder(model, revision)
    if not holds(folder, "config.json") and holds(folder, "adapter_config.json"):
        raise CheckpointError(
            f"{folder}/adapter_config.json: an unmerged adapter without its base model; "
            "merge it (peft's merge_and_unload) and save the whole model"
        )
    data = read_json(folder, "config.json")
    config_data = _with_generation_config(data, folder)
    config = GPT2Config.from_dict(config_data, f"{folder}/config.json")
    if holds(folder, PACKED_FILE):
        source: TensorSource = _packed_weights(folder)
    else:
        _require_safetensors(folder)
        source = SafetensorsFiles(folder)
    return Checkpoint(source, config, str(folder), folder)


def _with_generation_config(config_data: Any, folder: Path) -> Any:
    """config.json's data with the eos and pad ids of generation_config.json, if it has any."""
    if not holds(folder, "generation_config.json") or not isinstance(config_data, Mapping):
        return config_data
    generation = read_json(folder, "generation_config.json")
    if not isinstance(generation, dict):
        raise CheckpointError(f"{folder}/generation_config.json: must hold a JSON object")
    keys = ("eos_token_id", "pad_token_id")
    ids = {k: generation[k] for k in keys if generation.get(k) is not None}
    GPT2Config.from_dict(ids, f"{folder}/generation_config.json")
    return {**config_data, **ids}


def _packed_weights(folder: Path) -> PackedWeights:
    for name in (SINGLE_FILE, INDEX_FILE):
        if holds(folder, name):
            raise CheckpointError(
                f"{folder}: holds {name} and {PACKED_FILE}, and they may be of two models"
            )
    return PackedWeights(folder)


def _require_safetensors(folder: Path) -> None:
    if any(holds(folder, name) for name in (SINGLE_FILE, INDEX_FILE)):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: only safetensors files are read (others can run code when "
            "opened). Convert a checkpoint you trust once, with transformers:\n"
            "  GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors files are read"
    )


def _resolve_folder(model: str | Path, revision: str | None) -> Path:
    if not isinstance(model, (str, Path)):
        raise wrong_type("model", f"must be a folder or a hub id, not {type(model).__name__}")
    if model == "":
        raise CheckpointError("the model's name is empty; give a folder or a hub id")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{folder}: is a file; give the folder it lies in")
    except (OSError, RuntimeError) as error:  # RuntimeError: of whom ~name is no home
        raise CheckpointError(f"{model}: no such folder ({error.args[-1]})") from error
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder")
    return _download(model, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_SUBFOLDERS,
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: no such folder here, not in the hub's cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo_id}: the hub says: {error}") from error


def _canonical_keys(infos: Mapping[str, TensorInfo], name: str) -> dict[str, str]:
    """Canonical name -> stored name, without the mask buffers of old checkpoints."""
    keys: dict[str, str] = {}
    for key in infos:
        canonical = canonical_name(key)
        if canonical is None:
            continue
        if canonical in keys:
            raise CheckpointError(
                f"{name}/{infos[key].file}: tensor {canonical} is stored twice, "
                f"as {keys[canonical]} and as {key}"
            )
        keys[canonical] = key
    return keys


def _all_finite(tensor: NDArray[Any]) -> bool:
    if tensor.dtype == NUMPY_DTYPES["BF16"]:  # ml_dtypes' own isfinite is slow
        return not bool(((tensor.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(tensor).all())
