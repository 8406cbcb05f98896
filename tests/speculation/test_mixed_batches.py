"""Rows of every kind in one batch, with drafts: each has what it has alone, without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import fastgen
from drafters import KnowingDrafter, all_tried, continuations_of, drafted_by, told
from engine_harness import random_prompt
from fastgen import SamplingParams
from fastgen.results import Generation

VOCAB_SIZE = 4096
GUIDED = [11, 13, 261, 262, 263, 300, 301, 302, 303]  # all that a row may say


def halve_some(token_ids: np.ndarray, logits: np.ndarray) -> None:
    logits[token_ids[-1] % 7 :: 7] /= 2


SHARED = random_prompt(np.random.default_rng(6), 70)  # two blocks that rows share
REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "greedy": ("And it came to pass", {"temperature": 0}),
    "greedy, long": (random_prompt(np.random.default_rng(4), 150), {"temperature": 0}),
    "n": ("The king", {"n": 3, "temperature": 0.8}),
    "best_of": ("In the beginning", {"n": 2, "best_of": 4, "temperature": 0.9}),
    "biased": (SHARED, {"logit_bias": {11: 2.5, 13: -3.0}, "temperature": 0.7}),
    "guided": (
        [*SHARED, 5],
        {"allowed_token_ids": GUIDED, "sequence_bias": {(11, 13): 4.0, (261,): -2.0}},
    ),
    "penalized": (
        [*SHARED, 6],
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "no_repeat_ngram_size": 3},
    ),
    "logprobs": ("And the LORD said", {"logprobs": 3, "top_k": 40}),
    "logprobs of both": (SHARED, {"logprobs": 1, "prompt_logprobs": 2, "temperature": 0}),
    "stops": ("And the sons of", {"stop": ["and", "the "], "top_p": 0.9}),
    "until a length": ("And he said", {"min_new_tokens": 20, "stop_token_ids": [11, 13]}),
    "on the host": (SHARED, {"logits_processor": halve_some}),
    "without drafts": ("The sun", {"speculate": False, "temperature": 0.8}),
}
NEVER = ("on the host", "without drafts")  # get drafts
Model = fastgen.Generator


def params_of(name: str) -> SamplingParams:
    seed = 100 + list(REQUESTS).index(name)
    return SamplingParams(**{"max_new_tokens": 40, "seed": seed, **REQUESTS[name][1]})


@pytest.fixture(scope="module", params=[None, "int8"], ids=["float32", "int8"])
def quantize(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def alone(quantize: Any) -> list[Generation]:
    """Each by itself on one thread, without drafts."""
    room: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 256, "num_threads": 1}
    with fastgen.load(**room, quantize=quantize, speculate="off") as model:
        return [
            found
            for name, (prompt, _) in REQUESTS.items()
            for found in model.generate([prompt], params_of(name))
        ]


@pytest.fixture(scope="module", params=[5, 20])
def model(request: pytest.FixtureRequest, quantize: Any) -> Iterator[Model]:
    """With seats for all rows, or so few that rows come as others end."""
    with fastgen.load(
        max_batch_size=request.param,
        max_seq_len=256,
        quantize=quantize,
        draft_model=fastgen.BUNDLED_MODEL,
    ) as made:
        yield made
        assert made.engine.num_unfinished == 0
        assert made.engine.num_free_blocks == made.plan.limits.num_blocks


def together(model: Model, order: Sequence[int]) -> list[Generation]:
    """All in one call, in this order; the results are in REQUESTS'."""
    names = [list(REQUESTS)[at] for at in order]
    prompts = [REQUESTS[name][0] for name in names]
    found = model.generate(prompts, [params_of(name) for name in names])
    return [found[list(order).index(at)] for at in range(len(found))]


@pytest.mark.parametrize("kind", ["right", "spoiled", "wrong", "hostile"])
def test_a_batch_with_drafts_gives_each_row_its_own_alone(
    model: Model, alone: list[Generation], kind: str
) -> None:
    order = np.random.default_rng(len(kind)).permutation(len(REQUESTS)).tolist()
    drafter = KnowingDrafter(continuations_of(alone), VOCAB_SIZE, kind)
    with drafted_by(model.engine, drafter):
        found = together(model, order)
    for name, one, wanted in zip(REQUESTS, told(found), told(alone), strict=True):
        assert one == wanted, name
    for name, one in zip(REQUESTS, found, strict=True):
        timings = one.timings
        if name in NEVER:
            assert timings.drafted_tokens == 0, name
        elif kind == "spoiled" and name != "stops":  # which may end soon
            assert 0 < timings.accepted_tokens < timings.drafted_tokens, name
        elif kind == "wrong":
            assert timings.accepted_tokens == 0 < timings.drafted_tokens, name


@pytest.mark.parametrize("drafters", ["text", "draft model", "both", "as loaded"])
def test_so_do_the_engines_own_drafters(
    model: Model, alone: list[Generation], drafters: str
) -> None:
    text, draft = model.engine.drafting.drafters
    chosen = {"text": [text], "draft model": [draft]}.get(drafters, [text, draft])
    for order in (range(len(REQUESTS)), range(len(REQUESTS))[::-1]):
        before = model.engine.stats.accepted_tokens
        if drafters == "as loaded":
            found = together(model, order)
        else:
            with drafted_by(model.engine, *chosen):
                found = together(model, order)
            assert model.engine.stats.accepted_tokens > before
        for name, one, wanted in zip(REQUESTS, told(found), told(alone), strict=True):
            assert one == wanted, name


def test_rows_come_and_go_beside_drafts(model: Model, alone: list[Generation]) -> None:
    """Streams that are read in turns; one is closed in the middle, one was never read."""
    names = list(REQUESTS)
    single = [name for name in names if params_of(name).best_of is None]
    with all_tried():
        streams = {name: model.stream(REQUESTS[name][0], params_of(name)) for name in single}
        next(streams["greedy, long"])
        streams.pop("greedy, long").close()
        streams.pop("stops").close()
        ids: dict[str, dict[int, list[int]]] = {name: {} for name in streams}
        reading = dict(streams)
        while reading:
            for name in list(reading):
                piece = next(reading[name], None)
                if piece is None:
                    del reading[name]
                else:
                    ids[name].setdefault(piece.index, []).extend(piece.token_ids)
    for name, found in ids.items():
        completions = alone[names.index(name)].completions
        assert found == {one.index: list(one.token_ids) for one in completions}, name
