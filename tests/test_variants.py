"""Every checkpoint variant against transformers: logits by the error rule, greedy tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import fastgen
from conftest import TOLERANCES
from reference import ReferenceGPT2
from stepping import all_logits
from variants import VARIANTS

Folder = Callable[[str], Path]
EXPECTED_WARNINGS = {"value_head": "v_head"}


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


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_as_close_to_float64_as_transformers(name: str, variant: Folder) -> None:
    folder = variant(name)
    rows = random_rows(name, VARIANTS[name][0].get("vocab_size", 211), (1, 31, 32, 33, 96, 2))
    reference = ReferenceGPT2(folder)
    expected = [reference.logits(row) for row in rows]
    peer_error = worst_error(
        transformers_logits(load_transformers(folder, torch.float32), rows), expected
    )
    largest = max(float(np.abs(logits).max()) for logits in expected)
    assert largest > 1, "logits are flat: the comparison would mean nothing"
    with load(folder, name) as model:
        whole = [all_logits(model.engine.decoder, [row], [96])[0] for row in rows]
        ragged = all_logits(model.engine.decoder, rows, [1, 7, 13])
    allowed = TOLERANCES["float32"]["ratio"] * peer_error + TOLERANCES["float32"]["slack"] * largest
    for found in (whole, ragged):
        error = worst_error(found, expected)
        assert error <= allowed, f"{name}: error {error:.2e}, transformers {peer_error:.2e}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "codeparrot", "untied", "bf16_file", "fp16_file"])
def test_16_bit_arithmetic_is_as_close_as_pytorchs(name: str, dtype: str, variant: Folder) -> None:
    assert_as_close_as_pytorch(name, dtype, variant(name), "cpu")


def assert_as_close_as_pytorch(name: str, dtype: str, folder: Path, device: str) -> None:
    """Error against float64 by the table's rule, next to transformers in the same dtype."""
    rows = random_rows(name, 211, (1, 17, 64, 96))
    reference = ReferenceGPT2(folder)
    expected = [reference.logits(row) for row in rows]
    peer = load_transformers(folder, getattr(torch, dtype)).to(device)
    peer_error = worst_error(transformers_logits(peer, rows, device), expected)
    with load(folder, dtype=dtype, device=device) as model:
        error = worst_error(all_logits(model.engine.decoder, rows, [5, 20]), expected)
    largest = max(float(np.abs(logits).max()) for logits in expected)
    allowed = TOLERANCES[dtype]["ratio"] * peer_error + TOLERANCES[dtype]["slack"] * largest
    assert error <= allowed, f"{name}: error {error:.2e}, transformers {peer_error:.2e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_equal_transformers(name: str, variant: Folder) -> None:
    """Equal up to where the reference's best two logits are closer than the rule allows to tell."""
    folder = variant(name)
    vocab_size = VARIANTS[name][0].get("vocab_size", 211)
    prompts = random_rows(name, vocab_size, (1, 9, 40, 64))
    peer = load_transformers(folder, torch.float32)
    reference = ReferenceGPT2(folder)
    with load(folder, name) as model:
        results = model.generate(prompts, temperature=0, max_new_tokens=32)
    for prompt, result in zip(prompts, results, strict=True):
        ours = list(result.completions[0].token_ids)
        ids = torch.tensor([prompt])
        theirs = peer.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert_same_greedy(reference, prompt, ours, theirs)


def assert_same_greedy(
    reference: ReferenceGPT2, prompt: list[int], ours: list[int], theirs: list[int]
) -> None:
    if ours == theirs:
        return
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    second, best = np.sort(reference.logits(prompt + theirs[:first])[-1])[-2:]
    assert best - second <= TOLERANCES["torch_gap"], f"token {first}: {ours} against {theirs}"
