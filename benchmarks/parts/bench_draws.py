"""The C++ sampler alone: from logits of GPT-2's vocabulary to ids, with every core that is granted.

Logits are as the bundled model gives them, stretched to that vocabulary, and have just been written
when they are drawn from, as after a head. bench_sampler.py compares more options with PyTorch's
and transformers' samplers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastgen
from fastgen.bench.shapes import VOCAB_SIZE, random_prompts
from fastgen.decoders.machine import granted_cores
from fastgen.native import native
from fastgen.sampling.draw import Draw
from fastgen.sampling.native_sampler import NativeSampler

BATCHES = (1, 8)
PROMPT, NEW = 100, 50  # tokens that a row has had and drawn before
KINDS = 32  # rows of logits that the rounds choose from
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
    },
}
Logits = NDArray[np.float32]

pytestmark = pytest.mark.skipif(native is None, reason="fastgen's C++ extension is not built")


@pytest.fixture(scope="module")
def kinds() -> Logits:
    """float32 (KINDS, V)"""
    from bench_sampler import like_the_bundled_models  # loads torch and transformers

    return like_the_bundled_models(KINDS, np.random.default_rng(0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_sampler(
    batch: int, case: str, kinds: Logits, rng: np.random.Generator, timed: Any, describe: Any
) -> None:
    sampler = NativeSampler(batch, VOCAB_SIZE, (), 2 * (PROMPT + NEW), granted_cores())
    seats = np.arange(batch, dtype=np.int32)
    drafts = np.full(batch, -1, np.int32)
    logits: Logits = np.empty((batch, VOCAB_SIZE), np.float32)

    def make() -> None:
        """The same seats with other rows in them."""
        seeds = rng.integers(0, 2**32, batch).tolist()
        prompts = random_prompts(batch, PROMPT, rng)
        drawn = random_prompts(batch, NEW, rng)
        for seat, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True)):
            sampler.bind(seat, fastgen.SamplingParams(seed=seed, **CASES[case]), prompt)
            for token_id in drawn[seat]:
                sampler.observe(seat, token_id)
        logits[:] = kinds[rng.choice(KINDS, batch, replace=False)]

    def call(_: None) -> list[Draw]:
        return sampler.draw(logits, seats, drafts)

    draws = timed(call, make, group=f"sampler: draw, batch {batch}", rounds=60, warmups=5)
    assert [draw.seat for draw in draws] == seats.tolist() and all(draw.ok for draw in draws)
    assert all(0 <= draw.token_id < VOCAB_SIZE for draw in draws)
    if case == "greedy":
        assert [draw.token_id for draw in draws] == logits.argmax(axis=1).tolist()
    describe(rows=batch, tokens=batch, threads=granted_cores())
