"""The torch decoder on an NVIDIA GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen
from agreement import assert_rows_agree
from fastgen.decoders.torch_sampler import TorchSampler
from fastgen.sampler import draw
from test_variants import assert_as_close_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
Folder = Callable[[str], Path]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "codeparrot", "untied", "head_dim_1", "head_dim_80"])
def test_logits_are_as_close_as_transformers(name: str, dtype: str, variant: Folder) -> None:
    assert_as_close_as_pytorch(name, dtype, variant(name), "cuda")


def test_generates_what_the_cpu_generates(model: fastgen.Generator) -> None:
    prompts = [f"{word} of the" for word in ["day", "king", "house", "land", "God", "people"]]
    params = [fastgen.SamplingParams(seed=i, max_new_tokens=30, top_k=50) for i in range(6)]
    wanted = model.generate(prompts, params)
    with fastgen.load(device="cuda", dtype="float32") as on_gpu:
        found = on_gpu.generate(prompts, params)
    for options, a, b in zip(params, wanted, found, strict=True):
        tokens = a.completions[0].token_ids, b.completions[0].token_ids
        assert_rows_agree(a.prompt_token_ids, options, *tokens)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"temperature": 0}])
def test_draws_what_the_definition_draws(options: dict[str, float]) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (16, 5000)).astype(np.float32)
    params = [fastgen.SamplingParams(seed=2**63 + seat, **options) for seat in range(16)]
    sampler = TorchSampler(16, torch.device("cuda"))
    for seat, one in enumerate(params):
        sampler.bind(seat, one, 9)
    seats = np.arange(16, dtype=np.int32)
    draws = sampler.draw(torch.from_numpy(logits).cuda(), seats, [-1] * 16)
    expected = [draw(row, one, 9)[0] for row, one in zip(logits, params, strict=True)]
    assert [one.token_id for one in draws] == expected
