"""transformers' assisted decoding on the engine: the same tokens, guessed several at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from drafters import KnowingDrafter, all_tried, drafted_by
from fastgen import GPT2LMHeadModel, SamplingParams
from hf_models import fresh_pair, generated, kv_rows_of, pair, random_ids


def looping_call(**options: Any) -> dict[str, Any]:
    """A prompt whose greedy continuation says something again."""
    theirs, _ = pair()
    ids = random_ids(theirs, np.random.default_rng(3), 1, 12)
    return {
        "input_ids": torch.cat([ids, ids], 1),
        "max_new_tokens": 30,
        "pad_token_id": 7,
        **options,
    }


def stats_of(model: Any) -> Any:
    return model._packed.kv_rows(model).engine.stats


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 4, "min_new_tokens": 5},
        {"eos_token_id": [3, 5, 8], "bad_words_ids": [[11], [3, 4]]},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["lookup", "assistant", "its twin"])
def test_greedy_tokens_are_transformers(way: str, options: dict[str, Any]) -> None:
    theirs, ours = fresh_pair()
    helpers = fresh_pair("plain")
    call = looping_call(do_sample=False, **options)
    drafts: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": helpers[1]},
        "its twin": {"assistant_model": copy.deepcopy(theirs)},
    }[way]
    expected = generated(theirs, **call, **drafts)
    with all_tried():
        found = generated(ours, **call, **drafts)
    assert ours.last_path == "native", ours.last_reason
    if options.get("return_dict_in_generate"):
        assert type(found) is type(expected)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(found, expected)
    if way == "its twin" and "no_repeat_ngram_size" not in options:
        assert stats_of(ours).accepted_tokens > 8, "the same weights, the same draws"


def test_samples_are_those_without_an_assistant() -> None:
    _, ours = fresh_pair()
    _, helper = fresh_pair("plain")
    found = []
    for drafts in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        torch.manual_seed(5)
        with all_tried():
            found.append(generated(ours, **looping_call(do_sample=True, top_k=20), **drafts))
        assert ours.last_path == "native", ours.last_reason
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_plain_calls_guess_too_and_change_no_bit() -> None:
    _, ours = fresh_pair()
    call = looping_call(
        do_sample=False, return_dict_in_generate=True, output_logits=True, max_new_tokens=60
    )
    with all_tried():
        drafted = generated(ours, **call)
    assert stats_of(ours).speculated_steps > 0
    ours._packed.kv_rows(ours).engine.drafting.use(())
    plain = generated(ours, **call)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert all(map(torch.equal, drafted.logits, plain.logits))


def test_a_search_with_beams_and_rows_with_drafts_change_nothing_of_each_other() -> None:
    """Their steps alternate: whenever beams have grown, the engine makes one of its own."""
    _, ours = fresh_pair()
    engine, prompt = kv_rows_of(ours).engine, looping_call()["input_ids"][0].tolist()
    params = SamplingParams(seed=3, max_new_tokens=60, logprobs=2, ignore_eos=True)
    beams = looping_call(do_sample=False, num_beams=3, num_return_sequences=3, max_new_tokens=12)
    engine.drafting.use(())
    wanted_beams = generated(ours, **beams)
    plain = engine.add_request(prompt, params)
    engine.run(lambda: plain.done)
    [alone] = plain.rows
    known = {(tuple(prompt), 3): tuple(alone.new_token_ids)}
    with drafted_by(engine, KnowingDrafter(known, kv_rows_of(ours).vocab_size, "spoiled")):
        request = engine.add_request(prompt, params)
        engine.run(lambda: engine.stats.accepted_tokens > 0)
        num_steps = [engine.stats.steps]

        def step_of_the_engine(ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
            if not request.done:
                engine.run(lambda: engine.stats.steps > num_steps[-1])
                num_steps.append(engine.stats.steps)
            return torch.zeros(len(ids), dtype=torch.bool)

        criteria = transformers.StoppingCriteriaList([step_of_the_engine])
        found = generated(ours, **beams, stopping_criteria=criteria)
        assert ours.last_path == "native", ours.last_reason
        assert len(num_steps) > 4, "they took turns"
        engine.run(lambda: request.done)
    assert torch.equal(found, wanted_beams)
    [row] = request.rows
    assert row.new_token_ids == alone.new_token_ids and row.logprobs == alone.logprobs
    assert 0 < request.timings.accepted_tokens < request.timings.drafted_tokens


def test_new_weights_of_an_assistant_are_seen() -> None:
    """The one that is no more like the model drafts badly; the text stays."""
    _, ours = fresh_pair()
    helper = copy.deepcopy(ours)
    call = looping_call(do_sample=False)
    accepted = []
    for _ in range(2):
        before = stats_of(ours).accepted_tokens
        with all_tried():
            output = generated(ours, **call, assistant_model=helper)
        accepted.append(stats_of(ours).accepted_tokens - before)
        assert torch.equal(output, generated(ours, **call))
        ours._packed.kv_rows(ours).engine.drafting.use(())  # nobody else drafts
        with torch.no_grad():
            for parameter in helper.parameters():
                parameter.copy_(torch.randn_like(parameter))
    assert accepted[0] > 8 > accepted[1]


@pytest.mark.parametrize(
    "unfit", ["subclass", "hooked", "vocabulary", "early exit", "batch", "cache"]
)
def test_other_calls_are_transformers(unfit: str) -> None:
    theirs, ours = fresh_pair()
    helpers: Any = fresh_pair("plain")
    call, drafts = looping_call(do_sample=False), [{"assistant_model": each} for each in helpers]
    seen: list[int] = []
    if unfit == "subclass":
        helpers[1].__class__ = type("Other", (transformers.GPT2LMHeadModel,), {})
    elif unfit == "hooked":
        for helper in helpers:
            helper.transformer.register_forward_hook(lambda *arguments: seen.append(1))
    elif unfit == "vocabulary":
        for helper in helpers:
            helper.resize_token_embeddings(helper.config.vocab_size + 8)
    elif unfit == "early exit":
        drafts = [{"assistant_early_exit": 1}] * 2
    elif unfit == "batch":
        call["input_ids"] = call["input_ids"].repeat(2, 1)
    else:
        call["use_cache"] = False
    expected, found = (
        generated(model, **call, **own) for model, own in zip((theirs, ours), drafts, strict=True)
    )
    assert ours.last_path != "native"
    if isinstance(expected, Exception):
        assert type(found) is type(expected) and str(found) == str(expected)
    else:
        assert torch.equal(found, expected)
    assert bool(seen) == (unfit == "hooked")


def test_an_assistant_is_kept_no_longer_than_by_others() -> None:
    _, ours = fresh_pair()
    helper = copy.deepcopy(ours)
    generated(ours, **looping_call(do_sample=False), assistant_model=helper)
    again = pickle.loads(pickle.dumps(ours))
    copied = copy.deepcopy(ours)
    for model in (again, copied):
        assert isinstance(model, GPT2LMHeadModel)
        assert torch.equal(
            generated(model, **looping_call(do_sample=False)),
            generated(ours, **looping_call(do_sample=False)),
        )
    gone = weakref.ref(helper)
    del helper
    gc.collect()
    assert gone() is None
