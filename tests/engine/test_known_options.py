"""Rows with options that the decoder's sampler does not know are drawn on the host, by the
definition: the same tokens, beside rows that the decoder draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine_harness import assert_idle, make_engine, new_tokens, random_prompt, run_all
from fastgen import SamplingParams
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request
from fastgen.sampling.options import DRAWN

KNOWN = frozenset({"temperature", "seed", "logprobs"})
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_n_sigma": 1.0, "logprobs": 2},
    {"temperature": 0.7, "seed": 5},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"top_k": 5, "min_new_tokens": 3},
    {"typical_p": 0.5, "logit_bias": {11: 2.0}},
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(seats=8)


def requests_of(engine: Engine, *, keeps_logits: bool = False) -> list[Request]:
    rng = np.random.default_rng(3)
    requests = []
    for seed, options in enumerate(OPTIONS):
        params = SamplingParams(**{"seed": seed, "max_new_tokens": 6, **options})
        prompt = random_prompt(rng, 9)
        requests.append(engine.add_request(prompt, params, keeps_logits=keeps_logits))
    return requests


def test_the_bundled_models_sampler_knows_all_but_functions(engine: Engine) -> None:
    unknown = {option.name for option in DRAWN} - engine.decoder.known_options
    assert unknown == {"logits_processor"}


def test_rows_go_around_a_sampler_that_does_not_know_their_options(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests_of(engine, keeps_logits=True)
    assert not any(row.draws_on_host for request in wanted for row in request.rows)
    run_all(engine, wanted)
    monkeypatch.setattr(engine.decoder, "known_options", KNOWN, raising=False)
    found = requests_of(engine, keeps_logits=True)
    on_host = [row.draws_on_host for request in found for row in request.rows]
    assert on_host == [not options.keys() <= KNOWN for options in OPTIONS]
    run_all(engine, found)
    assert list(map(new_tokens, found)) == list(map(new_tokens, wanted))
    for one, other in zip(found, wanted, strict=True):
        [row], [same] = one.rows, other.rows
        np.testing.assert_array_equal(row.raw_logits, same.raw_logits)
        assert (row.logprobs is None) == (same.logprobs is None)
    assert_idle(engine)
