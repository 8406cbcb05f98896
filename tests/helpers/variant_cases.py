"""Checkpoint variants as transformers runs them, and how far a decoder may be from float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import fastgen
from reference import ReferenceGPT2
from stepping import all_logits
from tolerances import TOLERANCES
from variants import VARIANTS

Folder = Callable[[str], Path]


EXPECTED_WARNINGS = {"value_head": "v_head", "fewer_layers": r"h\.2\.attn"}


DECODERS = ("cpu", "torch")


LENGTHS = (1, 31, 32, 33, 96, 2)


def load(folder: Path, name: str = "", **options: Any) -> fastgen.Generator:
    options = {"max_batch_size": 8, **options}
    if name in EXPECTED_WARNINGS:
        with pytest.warns(UserWarning, match=EXPECTED_WARNINGS[name]):
            return fastgen.load(folder, **options)
    return fastgen.load(folder, **options)


def load_transformers(folder: Path, dtype: torch.dtype) -> GPT2LMHeadModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GPT2LMHeadModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()


def random_rows(name: str, vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(sum(map(ord, name)))
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def worst_error(found: list[Any], expected: list[Any]) -> float:
    return max(
        float(np.abs(np.asarray(a, np.float64) - b).max())
        for a, b in zip(found, expected, strict=True)
    )


@torch.inference_mode()
def transformers_logits(
    peer: GPT2LMHeadModel, rows: list[list[int]], device: str = "cpu"
) -> list[Any]:
    inputs = [torch.tensor([row], device=device) for row in rows]
    return [peer(ids).logits[0].float().cpu().numpy() for ids in inputs]


class Case(NamedTuple):
    """Rows of a checkpoint, their float64 logits, and how far transformers is from these."""

    rows: list[list[int]]
    expected: list[Any]
    peer_error: float

    def allowed(self, dtype: str) -> float:
        """The error that the table's rule allows."""
        largest = max(float(np.abs(logits).max()) for logits in self.expected)
        assert largest > 1, "logits are flat: the comparison would mean nothing"
        rule = TOLERANCES[dtype]
        allowed: float = rule["ratio"] * self.peer_error + rule["slack"] * largest
        return allowed

    def assert_close(self, found: list[Any], dtype: str) -> None:
        error, allowed = worst_error(found, self.expected), self.allowed(dtype)
        assert error <= allowed, f"error {error:.2e}, the peer's {self.peer_error:.2e}"


@cache
def transformers_case(
    name: str, folder: Path, lengths: tuple[int, ...], dtype: str = "float32", device: str = "cpu"
) -> Case:
    rows = random_rows(name, vocab_size_of(name), lengths)
    reference = ReferenceGPT2(folder)
    expected = [reference.logits(row) for row in rows]
    peer = load_transformers(folder, getattr(torch, dtype)).to(device)
    return Case(rows, expected, worst_error(transformers_logits(peer, rows, device), expected))


def vocab_size_of(name: str) -> int:
    return int(VARIANTS[name][0].get("vocab_size", 211))


def assert_as_close_as_pytorch(
    name: str, dtype: str, folder: Path, device: str = "cpu", decoder: str = "auto"
) -> None:
    """Error against float64 by the table's rule, next to transformers in the same dtype."""
    case = transformers_case(name, folder, (1, 17, 64, 96), dtype, device)
    with load(folder, dtype=dtype, device=device, decoder=decoder) as model:
        case.assert_close(all_logits(model.engine.decoder, case.rows, [5, 20]), dtype)


@cache
def greedy_tokens_of_transformers(name: str, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and what follows each."""
    peer = load_transformers(folder, torch.float32)
    found = []
    for prompt in random_rows(name, vocab_size_of(name), (1, 9, 40, 64)):
        ids = torch.tensor([prompt])
        tokens = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32,
            pad_token_id=0,
        )  # fmt: skip
        found.append((prompt, tokens[0, len(prompt) :].tolist()))
    return found


def assert_same_greedy(
    reference: ReferenceGPT2, prompt: list[int], ours: list[int], theirs: list[int]
) -> None:
    if ours == theirs:
        return
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    second, best = np.sort(reference.logits(prompt + theirs[:first])[-1])[-2:]
    assert best - second <= TOLERANCES["torch_gap"], f"token {first}: {ours} against {theirs}"
