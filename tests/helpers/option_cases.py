"""For each decoding option a row whose next draw it decides, by the definition, if any draw depends
on it.

A new option needs a case here: then every sampler is shown to act on it, or to be gone around.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fastgen import SamplingParams
from fastgen.errors import OptionError
from fastgen.sampling.draw import Draw
from fastgen.sampling.options import BY_NAME, unknown_to
from sampling_harness import EOS, DefinedRow, Make

LOGITS = np.linspace(0, 3.5, 8).astype(np.float32)  # the last id has the highest
PROMPT = [7, 1, 2]


@dataclass(frozen=True)
class Case:
    """A value of the option, and what else the row has: other options, and tokens that were
    generated before. `greedy`: the draw does not depend on a uniform."""

    value: Any
    others: dict[str, Any] = field(default_factory=dict)
    generated: tuple[int, ...] = ()
    greedy: bool = False


def greedy(value: Any, generated: tuple[int, ...] = (), **others: Any) -> Case:
    return Case(value, {"temperature": 0, **others}, generated, greedy=True)


CASES: dict[str, Case] = {
    "n": Case(3),
    "best_of": Case(2),
    "speculate": Case(False),
    "rank": Case(len, {"best_of": 2}),
    "max_new_tokens": Case(9),
    "logit_bias": greedy({2: 50.0}),
    "sequence_bias": greedy({(2, 4): 50.0}),
    "repetition_penalty": greedy(100.0),
    "frequency_penalty": greedy(50.0, generated=(7,)),
    "presence_penalty": greedy(50.0, generated=(7,)),
    "no_repeat_ngram_size": greedy(1),
    "bad_words": greedy([[2, 7]]),
    "min_new_tokens": greedy(4, stop_token_ids=[7]),
    "allowed_token_ids": greedy([4, 5]),
    "exponential_decay_length_penalty": greedy((0, 100.0), generated=(7,)),
    "suppress_tokens": greedy([7], generated=(7,)),
    "begin_suppress_tokens": greedy([7]),
    "logits_processor": greedy(lambda token_ids, logits: -logits),
    "temperature": Case(0.01),
    "top_n_sigma": Case(0.5),
    "top_h": Case(0.1),
    "top_k": Case(1),
    "top_p": Case(0.1),
    "min_p": Case(0.9),
    "typical_p": Case(0.1),
    "epsilon_cutoff": Case(0.3),
    "eta_cutoff": Case(0.9),
    "stop": Case(["a"]),
    "stop_token_ids": greedy([7], min_new_tokens=4),
    "include_stop": Case(True),
    "ignore_eos": greedy(True, min_new_tokens=4, logit_bias={3: 50.0}),
    "seed": Case(2),
    "logprobs": Case(2),
    "prompt_logprobs": Case(1),
}


def params_of(name: str, seed: int = 0) -> tuple[SamplingParams, SamplingParams]:
    """With the option, and without it."""
    case = CASES[name]
    others = {"seed": seed, **case.others} if name != "seed" else dict(case.others)
    return SamplingParams(**{**others, name: case.value}), SamplingParams(**others)


def row_of(name: str, params: SamplingParams) -> DefinedRow:
    row = DefinedRow(params, PROMPT, EOS)
    row.token_ids += CASES[name].generated
    return row


def deciding_params(name: str) -> tuple[SamplingParams, SamplingParams]:
    """`params_of` with a seed of which the definition draws one id with the option, and another
    without it."""
    for seed in range(1 if CASES[name].greedy else 100):
        pair = params_of(name, seed)
        ids = [row_of(name, params).draw(LOGITS)[0] for params in pair]
        if ids[0] != ids[1]:
            return pair
    raise AssertionError(f"{name} decides no draw of its case")


def check_option(make: Make, name: str) -> None:
    """A sampler draws what the definition draws, with the option and without; or refuses it by
    name, having said beforehand that it does not know it."""
    decides = BY_NAME[name].is_drawn and name != "logprobs"
    params, without = deciding_params(name) if decides else params_of(name)
    sampler: Any = make(1, len(LOGITS), EOS)
    if unknown_to(sampler.known_options, params):
        assert unknown_to(sampler.known_options, params) == [name]
        with pytest.raises(OptionError, match=name) as caught:
            sampler.bind(0, params, PROMPT)
        assert caught.value.option == name
        return
    drawn, plain = (_draw(sampler, name, one) for one in (params, without))
    assert (drawn.token_id, drawn.ok) == row_of(name, params).draw(LOGITS)
    assert (plain.token_id, plain.ok) == row_of(name, without).draw(LOGITS)
    assert (drawn.token_id != plain.token_id) == decides
    assert (drawn.logprobs is not None) == (name == "logprobs")


def _draw(sampler: Any, name: str, params: SamplingParams) -> Draw:
    sampler.bind(0, params, PROMPT)
    for token_id in CASES[name].generated:
        sampler.observe(0, token_id)
    [draw] = sampler.draw(LOGITS[None].copy(), np.zeros(1, np.int32), [-1])
    sampler.release(0)
    return draw  # type: ignore[no-any-return]
