"""Steps of the C++ decoder, and of the CUDA decoder where there is a GPU, on two layers of GPT-2
124M's shape with its whole head, and random weights. Each step is waited for before the next."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import PRECISIONS
from rows import Rows

import fastgen
from fastgen.bench.shapes import VOCAB_SIZE, Shape, random_prompts, save_checkpoint
from fastgen.decoders.interface import Decoder, StepBatch
from fastgen.decoders.machine import may_have_gpu
from fastgen.native import native
from fastgen.sampling.draw import Draw

SHAPE = Shape(layers=2, hidden=768, heads=12)
BATCHES = (1, 8, 32)
CONTEXT = 128  # tokens, in the middle round
PROMPT = 256  # tokens of a prefill: one step of the C++ decoder
MAX_LEN = 288  # tokens of a row
ROUNDS, WARMUPS = 20, 4
DECODERS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def why_not(name: str) -> str | None:
    """What keeps this decoder from running here."""
    if name == "cpu":
        return "fastgen's C++ extension is not built" if native is None else None
    if may_have_gpu() and importlib.util.find_spec("triton") is not None:
        import torch

        if torch.cuda.is_available():
            return None
    return "needs an NVIDIA GPU and Triton"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 210 MB."""
    return save_checkpoint(tmp_path_factory.mktemp("two_layers"), SHAPE)


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, precision: str, checkpoint: Path) -> Iterator[Decoder]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with fastgen.load(
        checkpoint,
        decoder=request.param,
        device=request.param,
        max_batch_size=max(BATCHES),
        max_seq_len=MAX_LEN,
        **PRECISIONS[precision],
    ) as model:
        model.warmup()
        yield model.engine.decoder


@pytest.mark.parametrize("batch", BATCHES)
def test_decode(
    batch: int, decoder: Decoder, rng: np.random.Generator, timed: Any, describe: Any
) -> None:
    """Each round is the rows' next step."""
    rows = Rows(decoder, batch, MAX_LEN)
    first = CONTEXT - WARMUPS - ROUNDS // 2
    prompts = random_prompts(batch, first, rng)
    rows.bind(prompts, temperature=0)
    rows.run(rows.prefill_batches(prompts))
    batches = iter(rows.decode_batches(first, WARMUPS + ROUNDS))

    def call(step: StepBatch) -> list[Draw]:
        return decoder.step(step).wait()

    group = f"decoder: decode step, batch {batch}"
    draws = timed(call, lambda: next(batches), group=group, rounds=ROUNDS, warmups=WARMUPS)
    rows.release()
    check(draws, batch)
    describe(rows=batch, tokens=batch, context=CONTEXT)


def test_prefill(decoder: Decoder, rng: np.random.Generator, timed: Any, describe: Any) -> None:
    """One prompt, its first token drawn."""
    rows = Rows(decoder, 1, MAX_LEN)

    def make() -> list[StepBatch]:
        prompts = random_prompts(1, PROMPT, rng)
        rows.bind(prompts, temperature=0)
        return list(rows.prefill_batches(prompts))

    draws = timed(rows.run, make, group=f"decoder: prefill of {PROMPT} tokens", rounds=10)
    rows.release()
    check(draws, 1)
    describe(rows=1, tokens=PROMPT)


def check(draws: list[Draw], count: int) -> None:
    """One good draw for each seat."""
    assert [draw.seat for draw in draws] == list(range(count))
    assert all(draw.ok and 0 <= draw.token_id < VOCAB_SIZE for draw in draws)
