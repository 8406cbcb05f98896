"""The tensors of a transformers model that is already in memory, as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from numpy.typing import NDArray

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.config import GPT2Config
from fastgen.checkpoints.files import NUMPY_DTYPES, TensorInfo
from fastgen.checkpoints.identity import Identity
from fastgen.checkpoints.tensor_names import EMBEDDING, HEAD
from fastgen.checks import wrong_type

_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class ModelTensors:
    """A TensorSource over a model's named tensors. What `load` gives is read-only: the model's own
    memory, if that is the host's; else a copy, of one tensor at a time."""

    def __init__(self, model: Any, tensors: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        if model.config.tie_word_embeddings and self._is_tied():
            del self._tensors[HEAD]  # else the two would be compared, byte by byte
        self.infos = {
            key: TensorInfo("state_dict", tuple(t.shape), _DTYPES.get(str(t.dtype), str(t.dtype)))
            for key, t in self._tensors.items()
        }

    def load(self, key: str) -> NDArray[Any]:
        tensor = self._tensors[key].detach().cpu()
        if self.infos[key].dtype == "BF16":  # NumPy has no bfloat16 of its own
            array = tensor.contiguous().view(_int16()).numpy().view(NUMPY_DTYPES["BF16"])
        else:
            array = tensor.numpy()
        array.flags.writeable = False
        return cast("NDArray[Any]", array)

    def identity(self) -> Identity | None:
        return None  # it may be written to at any time

    def _is_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        head, embedding = self._tensors.get(HEAD), self._tensors.get(f"transformer.{EMBEDDING}")
        if head is None or embedding is None or head.shape != embedding.shape:
            return False
        return bool(head.data_ptr() == embedding.data_ptr() and head.dtype == embedding.dtype)


def checkpoint_of_model(model: Any, tensors: Mapping[str, Any] | None = None) -> Checkpoint:
    """The Checkpoint of a transformers GPT2LMHeadModel.

    Args:
        tensors: in place of its `state_dict()`, which hooks may have changed.

    Raises:
        OptionTypeError: it is no such model.
        CheckpointError: it cannot be run exactly; names the config key or tensor.
    """
    if not callable(getattr(model, "state_dict", None)) or not hasattr(model, "config"):
        raise wrong_type(
            "model",
            "must be a folder, a hub id or a transformers GPT2LMHeadModel, "
            f"not {type(model).__name__}",
        )
    data = dict(model.config.to_dict())
    generation = getattr(model, "generation_config", None)
    for key in ("eos_token_id", "pad_token_id"):
        if getattr(generation, key, None) is not None:
            data[key] = getattr(generation, key)
    name = type(model).__name__
    source = ModelTensors(model, model.state_dict() if tensors is None else tensors)
    return Checkpoint(source, GPT2Config.from_dict(data, f"{name}.config"), name)


def _int16() -> Any:
    import torch

    return torch.int16
