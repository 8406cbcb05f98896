"""A smaller model drafts: what it proposes is what it would itself have generated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastgen
from drafters import drafted_by, told
from engine_harness import random_prompt
from fastgen import SamplingParams
from fastgen.decoders.cpu.decoder import CpuDecoder
from fastgen.decoders.plan import LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.frontends.generator import open_model
from fastgen.sampling.philox import sample_seed
from fastgen.speculation.draft_model import DraftModelDrafter
from tiny_checkpoints import write_checkpoint


@dataclass(eq=False)
class Row:
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    max_len: int = 192
    cache_salt: str | None = None
    rejected: int = field(default=0)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with some noise: it agrees with it often, and not always."""
    folder = tmp_path_factory.mktemp("noisy")
    for path in Path(fastgen.BUNDLED_MODEL).iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copy(path, folder)
    rng = np.random.default_rng(3)
    for path in Path(fastgen.BUNDLED_MODEL).glob("*.safetensors"):
        tensors = {
            name: (one + 0.2 * one.std() * rng.normal(size=one.shape)).astype(one.dtype)
            for name, one in load_file(path).items()
        }
        save_file(tensors, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def plain() -> Iterator[fastgen.Generator]:
    with fastgen.load(max_batch_size=4, max_seq_len=192, speculate="off") as model:
        yield model


def make_drafter(seats: int = 4, max_seq_len: int = 192, max_tokens: int = 0) -> DraftModelDrafter:
    checkpoint = open_model()
    options = LoadOptions(max_batch_size=seats, max_seq_len=max_seq_len)
    decoder: Any = build_decoder(checkpoint, plan_decoder(checkpoint, options))
    if max_tokens:
        object.__setattr__(decoder.limits, "max_tokens", max_tokens)
    return DraftModelDrafter(decoder)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"top_k": 20, "logit_bias": {11: 3.0}},
]


def own_continuation(model: fastgen.Generator, row: Row, count: int) -> list[int]:
    """What the model generates after the row's tokens; a row's first sample has its seed as it
    is."""
    params = SamplingParams(**{
        **{key: value for key, value in vars(row.params).items() if key != "max_new_tokens"},
        "max_new_tokens": count, "ignore_eos": True,
    })  # fmt: skip
    [generation] = model.generate([row.token_ids], params)
    return list(generation.completions[0].token_ids)


def test_it_proposes_what_it_would_generate(plain: fastgen.Generator) -> None:
    """After refusals, too, and for rows that come and go."""
    rng = np.random.default_rng(8)
    rows: list[Row] = []
    drafter = make_drafter()
    assert sample_seed(77, 0) == 77
    for turn in range(14):
        if len(rows) < 4 and turn % 2 == 0:
            params = SamplingParams(seed=int(rng.integers(2**40)), **OPTIONS[turn // 2 % 4])
            prompt = random_prompt(rng, int(rng.integers(1, 60)))
            rows.append(Row(prompt, len(prompt), params))
        most = rng.integers(1, 6, len(rows)).tolist()
        drafts = drafter.propose(rows, most)
        for row, draft, count in zip(rows, drafts, most, strict=True):
            assert list(draft.ids) == own_continuation(plain, row, count)
            kept = int(rng.integers(count + 1))
            drafter.accepted(row, draft.ids[:kept])
            row.token_ids += [*draft.ids[:kept], int(rng.integers(1, 4096))]
        if rng.random() < 0.2:
            drafter.ended(rows.pop(int(rng.integers(len(rows)))))
    drafter.close()


def test_a_long_prompt_is_caught_up_with_chunk_by_chunk(plain: fastgen.Generator) -> None:
    rng = np.random.default_rng(1)
    drafter = make_drafter(max_tokens=40)
    params = SamplingParams(temperature=0)
    long, short = Row(random_prompt(rng, 100), 100, params), Row(random_prompt(rng, 5), 5, params)
    found = [drafter.propose([short, long], [3, 3]) for _ in range(4)]
    assert [len(drafts[0].ids) for drafts in found] == [3] * 4
    assert [len(drafts[1].ids) for drafts in found] == [0, 0, 3, 3]
    assert list(found[-1][1].ids) == own_continuation(plain, long, 3)
    drafter.close()


def test_rows_without_a_seat_or_beyond_its_context_have_no_draft() -> None:
    rng = np.random.default_rng(2)
    drafter = make_drafter(seats=1, max_seq_len=32)
    params = SamplingParams(temperature=0)
    first, second = (Row(random_prompt(rng, 28), 28, params) for _ in range(2))
    drafts = drafter.propose([first, second], [9, 9])
    assert [len(draft.ids) for draft in drafts] == [4, 0], "28 tokens, and 4 more"
    first.token_ids += random_prompt(rng, 4)
    assert drafter.propose([first], [3])[0].ids == []
    drafter.ended(first)
    assert len(drafter.propose([second], [2])[0].ids) == 2
    host = Row([1], 1, SamplingParams(logits_processor=lambda ids, logits: None))
    drafter.ended(second)
    assert drafter.propose([host], [2])[0].ids == ()
    drafter.close()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_the_model_itself_is_always_right(
    plain: fastgen.Generator, options: dict[str, Any]
) -> None:
    """Also sampled, since it draws with the row's own uniforms."""
    params = SamplingParams(max_new_tokens=40, seed=9, n=2, ignore_eos=True, **options)
    prompts = ["In the beginning", "And the LORD said"]
    wanted = plain.generate(prompts, params)
    with fastgen.load(
        max_batch_size=4, max_seq_len=192, draft_model=fastgen.BUNDLED_MODEL
    ) as model:
        [_, drafter] = model.engine.drafting.drafters
        with drafted_by(model.engine, drafter):
            found = model.generate(prompts, params)
    assert told(found) == told(wanted)
    timings = [one.timings for one in found]
    assert all(0 < one.accepted_tokens == one.drafted_tokens for one in timings)


def test_a_warmup_is_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[CpuDecoder] = []
    monkeypatch.setattr(CpuDecoder, "warmup", lambda decoder: warmed.append(decoder))
    with fastgen.load(
        max_batch_size=1, max_seq_len=64, decoder="cpu", draft_model=fastgen.BUNDLED_MODEL
    ) as model:
        model.warmup()
        assert warmed[0] is model.engine.decoder and len(set(warmed)) == 2


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_another_model_changes_no_token(noisy: Path, quantize: str | None) -> None:
    room: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 192, "quantize": quantize}
    params = SamplingParams(max_new_tokens=60, seed=3, n=2, temperature=0.7, logprobs=1)
    prompts = ["In the beginning", "And the LORD said", "The king"]
    with fastgen.load(**room, speculate="off") as model:
        wanted = model.generate(prompts, params)
    with fastgen.load(**room, draft_model=noisy) as model:
        drafter = model.engine.drafting.drafters[-1]
        with drafted_by(model.engine, drafter):
            found = model.generate(prompts, params)
            stats = model.engine.stats
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert told(found) == told(wanted)
        assert told(model.generate(prompts, params)) == told(wanted), "as it is loaded"


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"draft_model: .* vocabulary of .* the model one of 4096"):
        fastgen.load(draft_model=tmp_path)


def test_a_draft_model_that_does_not_fit_says_so_and_leaves_nothing() -> None:
    with fastgen.load(max_batch_size=1) as model:
        used = -(-model.plan.memory.total // 2**20)
    refused = (
        rf"draft_model: the model leaves 1 MB of max_memory={used + 1} MB; one context of .* needs"
    )
    with pytest.raises(ValueError, match=refused):
        fastgen.load(max_batch_size=1, max_memory=used + 1, draft_model=fastgen.BUNDLED_MODEL)
