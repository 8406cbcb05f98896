"""The torch decoder on an NVIDIA GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastgen
from agreement import assert_rows_agree
from fastgen.decoders.plan import LoadOptions
from fastgen.sampling.torch_sampler import TorchSampler
from sampling_harness import DefinedRow, random_logits, random_params
from variant_cases import assert_as_close_as_pytorch, load_transformers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
Folder = Callable[[str], Path]
EOS = frozenset({0, 3})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "codeparrot", "untied", "head_dim_1", "head_dim_80"])
def test_logits_are_as_close_as_transformers(name: str, dtype: str, variant: Folder) -> None:
    assert_as_close_as_pytorch(name, dtype, variant(name), "cuda", "torch")


def test_generates_what_the_cpu_generates(model: fastgen.Generator) -> None:
    prompts = [f"{word} of the" for word in ["day", "king", "house", "land", "God", "people"]]
    params = [fastgen.SamplingParams(seed=i, max_new_tokens=30, top_k=50) for i in range(6)]
    wanted = model.generate(prompts, params)
    with fastgen.load(device="cuda", dtype="float32", decoder="torch") as on_gpu:
        found = on_gpu.generate(prompts, params)
    for options, a, b in zip(params, wanted, found, strict=True):
        tokens = a.completions[0].token_ids, b.completions[0].token_ids
        assert_rows_agree(a.prompt_token_ids, options, *tokens)


@pytest.mark.parametrize("decoder", ["torch", "auto"])
def test_the_drop_in_is_transformers(
    decoder: str, variant: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadOptions, "decoder", decoder)
    model = load_transformers(variant("plain"), torch.float32).cuda()
    ids = torch.tensor([[5, 9, 2, 77], [1, 1, 3, 8]], device="cuda")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    wanted = [
        model(ids).logits,
        model.generate(ids, attention_mask=mask, **options),
        model.generate(ids, attention_mask=mask, num_beams=3, **options),
    ]
    fast: Any = fastgen.accelerate(model)
    assert torch.allclose(fast(ids).logits, wanted[0], atol=1e-3)
    assert torch.equal(fast.generate(ids, attention_mask=mask, **options), wanted[1])
    beams = fast.generate(ids, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(beams, wanted[2])


@pytest.mark.parametrize("vocab_size", [64, 5000])
def test_draws_what_the_definition_draws(vocab_size: int) -> None:
    """Every option, rows together, several tokens long."""
    rng = np.random.default_rng(vocab_size)
    rows = [DefinedRow(random_params(rng, vocab_size), [1, 2], EOS) for _ in range(64)]
    sampler = TorchSampler(64, vocab_size, EOS, torch.device("cuda"))
    for seat, row in enumerate(rows):
        sampler.bind(seat, row.params, row.token_ids)
    for _ in range(4):
        logits = random_logits(rng, 64, vocab_size)
        seats = np.arange(64, dtype=np.int32)
        draws = sampler.draw(torch.from_numpy(logits).cuda(), seats, [-1] * 64)
        for drawn, row, own in zip(draws, rows, logits, strict=True):
            assert (drawn.token_id, drawn.ok) == row.draw(own), row.params
