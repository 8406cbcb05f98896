"""Pairs of one random model as transformers and as fastgen run it, and what may differ."""

from __future__ import annotations

import copy
import gc
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

import fastgen
from fastgen.hf.kv_rows import KvRows
from tolerances import TOLERANCES
from variants import random_model

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied, exact gelu, other scales": {
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "scale_attn_by_inverse_layer_idx": True,
        "n_inner": 50,
    },
    "odd sizes, pad of its own": {
        "vocab_size": 97,
        "n_embd": 30,
        "n_head": 6,
        "n_layer": 2,
        "pad_token_id": 3,
        "eos_token_id": [7, 11],
    },
}


@cache
def pair(name: str = "plain") -> tuple[Any, Any]:
    """Shared: a test that changes weights takes `fresh_pair`."""
    return fresh_pair(name)


def fresh_pair(name: str = "plain") -> tuple[Any, Any]:
    """A variant as transformers' model and as fastgen's; what types transformers has for its own
    methods do not fit how they are called.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = random_model(seed=sum(map(ord, name)), **CHECKPOINTS[name])
    return theirs, fastgen.accelerate(copy.deepcopy(theirs))


def tolerance(logits: torch.Tensor) -> float:
    """How far fastgen's float32 logits may be from transformers': each is off by as much."""
    finite = logits[logits.isfinite()]
    share: float = TOLERANCES["drop_in"]
    return share * max(1.0, float(finite.abs().max()))


def random_ids(
    model: Any, rng: np.random.Generator, batch_size: int, length: int, *, special: bool = False
) -> torch.Tensor:
    """Prompts (B, T) without the ids of eos and padding, unless `special`."""
    ids = rng.integers(0 if special else 12, model.config.vocab_size, (batch_size, length))
    return torch.from_numpy(ids)


def left_padded(ids: torch.Tensor, pads: list[int], pad_id: int) -> dict[str, Any]:
    """input_ids and attention_mask of rows whose first `pads` tokens are padding."""
    mask = torch.ones_like(ids)
    ids = ids.clone()
    for row, count in enumerate(pads):
        mask[row, :count] = 0
        ids[row, :count] = pad_id
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, seed: Any = 0, **arguments: Any) -> Any:
    """What `generate` returns, or the exception that it raises; without transformers' warnings."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.generate(**arguments)
        except Exception as error:
            return error


def kv_rows_of(model: Any) -> KvRows:
    """The drop-in's rows, decoder and engine for the model's weights as they are now."""
    kv: KvRows = model._packed.kv_rows(model)
    return kv


def num_used_blocks(model: Any) -> int:
    gc.collect()
    kv = kv_rows_of(model)
    kv.forward([], np.empty((0, 1), np.float32))  # blocks of caches that have gone are taken back
    return int(kv.decoder.limits.num_blocks - kv.engine.num_free_blocks)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.clone())

    def end(self) -> None:
        self.ends += 1
