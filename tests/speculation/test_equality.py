"""Drafts change the time, and never a token: whatever the options, the batch and the drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import fastgen
from agreement import assert_rows_agree
from drafters import KINDS, KnowingDrafter, continuations_of, drafted_by, told
from engine_harness import eos_ids_of, random_prompt
from fastgen import SamplingParams
from fastgen.sampling.options import OPTIONS
from sampling_harness import maybe, random_filters, random_processors

VOCAB_SIZE = 4096
STOPS = [" the", "\n", "and", "e ", "LORD", "."]


@pytest.fixture(scope="module")
def models() -> Iterator[list[fastgen.Generator]]:
    """With different numbers of threads and seats."""
    made = [
        fastgen.load(max_batch_size=seats, num_threads=threads, max_seq_len=192, speculate="off")
        for seats, threads in ((1, 1), (4, 2), (9, 3))
    ]
    yield made
    for model in made:
        assert model.engine.num_unfinished == 0
        assert model.engine.num_free_blocks == model.plan.limits.num_blocks
        model.close()


def halve_some(token_ids: np.ndarray, logits: np.ndarray) -> None:
    logits[token_ids[-1] % 7 :: 7] /= 2


def random_options(rng: np.random.Generator) -> SamplingParams:
    """Of every kind; some rows are drawn on the host, some score their prompt."""
    others = maybe(
        rng,
        {
            "n": lambda: int(rng.integers(2, 4)),
            "best_of": lambda: int(rng.integers(3, 5)),
            "logprobs": lambda: int(rng.integers(0, 4)),
            "prompt_logprobs": lambda: int(rng.integers(0, 2)),
            "logits_processor": lambda: halve_some,
            "stop": lambda: rng.choice(STOPS, rng.integers(1, 4)).tolist(),
            "include_stop": lambda: True,
            "speculate": lambda: False,
        },
        0.15,
    )
    processors = random_processors(rng, VOCAB_SIZE) if rng.random() < 0.6 else {}
    return SamplingParams(
        temperature=float(rng.choice([0, 0, 0.7, 1.0])),
        max_new_tokens=int(rng.integers(5, 30)),
        seed=int(rng.integers(2**63)),
        **others,
        **processors,
        **random_filters(rng, 0.3),
    )


def chunked(model: fastgen.Generator, rng: np.random.Generator) -> None:
    """Have prompts cut otherwise, and fewer logits."""
    seats = model.plan.limits.num_seats
    limits = model.engine.decoder.limits
    object.__setattr__(limits, "max_tokens", int(rng.integers(seats + 32, 256)))
    object.__setattr__(limits, "max_logits", int(rng.integers(max(seats, 2), 128)))


def check_batches(
    models: Sequence[fastgen.Generator], rng: np.random.Generator, num_params: int
) -> dict[str, int]:
    """So many sets of options, in batches; returns what came of the drafts."""
    texts = [random_prompt(rng, 150) for _ in range(3)]
    counts = {"drafted": 0, "accepted": 0, "steps": 0, "plain steps": 0}
    while num_params > 0:
        model = models[int(rng.integers(len(models)))]
        size = int(rng.integers(1, 9))
        num_params -= size
        prompts = [
            texts[rng.integers(3)][: rng.integers(1, 120)]
            + random_prompt(rng, int(rng.integers(9)))
            for _ in range(size)
        ]
        params = [random_options(rng) for _ in prompts]
        chunked(model, rng)
        before = model.engine.stats.steps
        plain = model.generate(prompts, params)
        counts["plain steps"] += model.engine.stats.steps - before
        kind = str(rng.choice(KINDS)) if rng.random() < 0.3 else None
        drafter = KnowingDrafter(continuations_of(plain), VOCAB_SIZE, kind)
        chunked(model, rng)
        before = model.engine.stats.steps
        with drafted_by(model.engine, drafter):
            drafted = model.generate(prompts, params)
        assert told(drafted) == told(plain), (kind, params)
        counts["steps"] += model.engine.stats.steps - before
        counts["drafted"] += sum(one.timings.drafted_tokens for one in drafted)
        counts["accepted"] += sum(one.timings.accepted_tokens for one in drafted)
    return counts


@pytest.mark.parametrize(
    "num_params",
    [150, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])],
)
def test_results_are_those_of_plain_decoding(
    models: list[fastgen.Generator], num_params: int
) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    counts = check_batches(models, np.random.default_rng(seed), num_params)
    assert 0 < counts["accepted"] < counts["drafted"]
    assert counts["steps"] < counts["plain steps"]


OPTION_VALUES: dict[str, dict[str, Any]] = {
    "n": {"n": 3},
    "best_of": {"best_of": 3},
    "speculate": {"speculate": True},
    "rank": {"best_of": 2, "rank": lambda completions: [len(c.text) for c in completions]},
    "max_new_tokens": {"max_new_tokens": 17},
    "logit_bias": {"logit_bias": {11: 3.0, 13: -4.0}},
    "sequence_bias": {"sequence_bias": {(11, 13): 4.0, (261,): -2.0}},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "frequency_penalty": {"frequency_penalty": 0.7},
    "presence_penalty": {"presence_penalty": 0.9},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words": [[11], [261, 13]]},
    "min_new_tokens": {"min_new_tokens": 12, "stop_token_ids": [11, 13, 261]},
    "allowed_token_ids": {"allowed_token_ids": list(range(5, 3000))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (8, 1.05)},
    "suppress_tokens": {"suppress_tokens": [11, 13]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [11, 13, 261]},
    "temperature": {"temperature": 0.6},
    "top_n_sigma": {"top_n_sigma": 1.5},
    "top_h": {"top_h": 0.6},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.8},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "stop": {"stop": ["zzqx", "LORD God said unto"]},
    "stop_token_ids": {"stop_token_ids": [4000]},
    "include_stop": {"include_stop": True, "stop": ["zzqx"]},
    "ignore_eos": {"ignore_eos": True},
    "seed": {"seed": 99},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 1},
}


def test_every_option_has_a_value_here() -> None:
    """But those whose rows are drawn on the host: these are not drafted for."""
    assert set(OPTION_VALUES) == {option.name for option in OPTIONS} - {"logits_processor"}


@pytest.mark.parametrize("name", OPTION_VALUES)
def test_an_option_counts_the_drafts_that_were_right(
    models: list[fastgen.Generator], name: str
) -> None:
    """In the same row, some of the drafts are accepted and some refused."""
    options: dict[str, Any] = {"max_new_tokens": 30, "seed": 5, **OPTION_VALUES[name]}
    prompts = [[261, 11, 300, 13], "And the king said unto the"]
    model = models[1]
    plain = model.generate(prompts, **options)
    drafter = KnowingDrafter(continuations_of(plain), VOCAB_SIZE, "spoiled")
    with drafted_by(model.engine, drafter):
        drafted = model.generate(prompts, **options)
    assert told(drafted) == told(plain)
    for generation in drafted:
        timings = generation.timings
        assert 0 < timings.accepted_tokens < timings.drafted_tokens
        assert timings.steps < 30 * SamplingParams(**options).num_rows


def test_rows_drawn_on_the_host_have_no_drafts(models: list[fastgen.Generator]) -> None:
    model, options = models[1], dict[str, Any](max_new_tokens=12, seed=3)
    prompts = [[5, 6], [7, 8]]
    params = [SamplingParams(logits_processor=halve_some, **options), SamplingParams(**options)]
    plain = model.generate(prompts, params)
    with drafted_by(model.engine, KnowingDrafter(continuations_of(plain), VOCAB_SIZE, "right")):
        drafted = model.generate(prompts, params)
    assert told(drafted) == told(plain)
    assert drafted[0].timings.drafted_tokens == 0 < drafted[1].timings.drafted_tokens


def test_a_row_can_do_without(models: list[fastgen.Generator]) -> None:
    model = models[1]
    plain = model.generate([5, 6], max_new_tokens=12, seed=3)
    drafter = KnowingDrafter(continuations_of(plain), VOCAB_SIZE, "right")
    with drafted_by(model.engine, drafter):
        [without] = model.generate([5, 6], max_new_tokens=12, seed=3, speculate=False)
    assert told([without]) == told(plain)
    assert without.timings.drafted_tokens == 0 and drafter.ended_rows == []


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": ["the", "and"]}, {"logprobs": 2}])
def test_streams_have_the_same_pieces(
    models: list[fastgen.Generator], options: dict[str, Any]
) -> None:
    """One for each token, with the text that came with it."""
    model = models[1]
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 8, **options}
    prompt = "And it came to pass in those days"
    with model.stream(prompt, **options) as stream:
        plain = list(stream)
    drafter = KnowingDrafter(
        continuations_of(model.generate(prompt, **options)), VOCAB_SIZE, "right"
    )
    before = model.engine.stats.accepted_tokens
    with drafted_by(model.engine, drafter), model.stream(prompt, **options) as stream:
        drafted = list(stream)
    assert model.engine.stats.accepted_tokens > before
    assert sorted(drafted, key=lambda piece: piece.index) == sorted(
        plain, key=lambda piece: piece.index
    )
    assert all(len(piece.token_ids) <= 1 for piece in drafted)


@pytest.mark.parametrize("kind", ["right", "spoiled", "random"])
def test_the_torch_decoder_agrees_as_far_as_it_does_with_itself(kind: str) -> None:
    rng = np.random.default_rng(2)
    prompts = [random_prompt(rng, int(length)) for length in (3, 40, 17)]
    params = [
        SamplingParams(max_new_tokens=20, seed=seed, temperature=temperature, ignore_eos=True)
        for seed, temperature in enumerate((0.0, 0.8, 1.0))
    ]
    with fastgen.load(decoder="torch", max_batch_size=4, speculate="off") as model:
        plain = model.generate(prompts, params)
        known = continuations_of(plain)
        before = model.engine.stats.speculated_steps
        with drafted_by(model.engine, KnowingDrafter(known, VOCAB_SIZE, kind)):
            drafted = model.generate(prompts, params)
        assert model.engine.stats.speculated_steps > before
        for prompt, one, found, wanted in zip(prompts, params, drafted, plain, strict=True):
            first, second = (each.completions[0].token_ids for each in (found, wanted))
            assert_rows_agree(prompt, one, first, second, eos_ids_of(model.engine))
