"""How far a quantized model is from the model itself, and copies that are hard to quantize.

Real GPT-2s have a few channels far larger than the rest, which the bundled model has not. A hard
copy is the bundled model (or another checkpoint) given such channels; its own float32 logits are
the reference. Shapes: T tokens, V vocabulary, C hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from data_files import HELD_OUT
from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.tokenizer import Tokenizer
from reference import Array, ReferenceGPT2

HARD_COPIES = ("values", "residual", "both")
HARD_KEYS = "keys"  # for keys in 8 bits

_NUM_VALUES = 4  # large value channels of a layer, and as many of keys
_VALUE_FACTOR = 50.0
_KEY_OFFSET = 100.0  # of as many others of a layer's keys, which are about 1
_RESIDUAL_PEAKS = (30.0, -20.0, -10.0)  # their sum is 0: the mean of a token stays what it was
_NORMED_PEAK = 2.5  # what a large residual channel is behind a norm, in gains: the usual size
_PROBED_TOKENS = 256

Tensors = dict[str, NDArray[np.float32]]


class HeldOut(NamedTuple):
    """Rows of held-out tokens, and for each of their tokens the one that follows it."""

    rows: list[list[int]]
    targets: list[NDArray[np.int64]]


class Quality(NamedTuple):
    kl: float  # mean KL divergence from the reference, nats a token
    perplexity_change: float  # ratio of the perplexities, less 1


def held_out(num_tokens: int, window: int = 1024) -> HeldOut:
    """The first tokens of the held-out text, in rows of up to `window`."""
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL)
    assert tokenizer is not None
    [token_ids] = tokenizer.encode([HELD_OUT.read_text(encoding="utf-8")])
    assert len(token_ids) > num_tokens
    starts = range(0, num_tokens, window)
    windows = [token_ids[start : min(start + window, num_tokens) + 1] for start in starts]
    return HeldOut([row[:-1] for row in windows], [np.array(row[1:]) for row in windows])


def kl_and_perplexity(
    reference_logits: NDArray[np.float32], logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> Quality:
    """`targets` (T,): the token that follows each of the T that the logits (T, V) stand behind."""
    kl = change = 0.0
    for some in _slices(len(targets)):
        wanted, found = _log_softmax(reference_logits[some]), _log_softmax(logits[some])
        kl += float((np.exp(wanted) * (wanted - found)).sum())
        at = np.arange(len(wanted)), targets[some]
        change += float((wanted[at] - found[at]).sum())
    return Quality(kl / len(targets), float(np.expm1(change / len(targets))))


def save_hard_copy(name: str, folder: Path, source: Path = BUNDLED_MODEL) -> Path:
    """Save `source`, made hard in the way `name` says, in float32."""
    tensors = {
        key.removeprefix("transformer."): tensor.astype(np.float32)
        for key, tensor in load_file(source / "model.safetensors").items()
    }
    config = json.loads((source / "config.json").read_text())
    rng = np.random.default_rng(0)
    if name in ("residual", "both"):  # first: it is the model of `source` that is probed
        _enlarge_residual(tensors, _norm_variances(source), rng)
    if name in ("values", "both"):
        _enlarge_values(tensors, config["n_layer"], rng)
    if name == HARD_KEYS:
        _enlarge_keys(tensors, config["n_layer"], rng)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def _enlarge_values(tensors: Tensors, num_layers: int, rng: np.random.Generator) -> None:
    """Values times 50, and attn.c_proj's rows divided by it: the same function."""
    for layer in range(num_layers):
        attention = f"h.{layer}.attn"
        projection = tensors[f"{attention}.c_proj.weight"]
        channels = rng.choice(len(projection), _NUM_VALUES, replace=False)
        values = 2 * len(projection) + channels
        tensors[f"{attention}.c_attn.weight"][:, values] *= _VALUE_FACTOR
        tensors[f"{attention}.c_attn.bias"][values] *= _VALUE_FACTOR
        projection[channels] /= _VALUE_FACTOR


def _enlarge_keys(tensors: Tensors, num_layers: int, rng: np.random.Generator) -> None:
    """Some keys times 50, and their queries divided by it; others with an offset, which adds the
    same to all scores of a query: the same function."""
    for layer in range(num_layers):
        name = f"h.{layer}.attn.c_attn"
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        hidden_size = len(weight)
        channels = rng.choice(hidden_size, 2 * _NUM_VALUES, replace=False)
        large, moved = channels[:_NUM_VALUES], channels[_NUM_VALUES:]
        weight[:, hidden_size + large] *= _VALUE_FACTOR
        bias[hidden_size + large] *= _VALUE_FACTOR
        weight[:, large] /= _VALUE_FACTOR
        bias[large] /= _VALUE_FACTOR
        bias[hidden_size + moved] += _KEY_OFFSET


def _enlarge_residual(
    tensors: Tensors, variances: dict[str, float], rng: np.random.Generator
) -> None:
    """Three residual channels made large at every position; another model, about as good.

    They raise the variance that each norm divides by. Its gains are raised to match, so that the
    other channels leave it as before, and those of the three are lowered.
    """
    hidden_size = tensors["wpe.weight"].shape[1]
    added = np.array(_RESIDUAL_PEAKS, np.float32)
    channels = rng.choice(hidden_size, len(added), replace=False)
    tensors["wpe.weight"][:, channels] += added
    for name, variance in variances.items():
        new_variance = variance + float((added**2).sum()) / hidden_size
        gain = tensors[f"{name}.weight"]
        lowered = gain[channels] * _NORMED_PEAK * np.sqrt(new_variance) / np.abs(added)
        gain *= np.sqrt(new_variance / variance)
        gain[channels] = lowered


def _norm_variances(folder: Path) -> dict[str, float]:
    """Mean variance of what enters each layer norm, on held-out tokens."""
    probe = _Probe(folder)
    [row] = held_out(_PROBED_TOKENS).rows
    probe.logits(row)
    return probe.variances


class _Probe(ReferenceGPT2):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.variances: dict[str, float] = {}

    def _norm(self, x: Array, name: str) -> Array:
        self.variances[name] = float(x.var(-1).mean())
        return super()._norm(x, name)


def _slices(count: int, step: int = 256) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, start + step)


def _log_softmax(logits: NDArray[Any]) -> Array:
    """(T, V), in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
