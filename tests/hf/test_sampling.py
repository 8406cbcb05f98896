"""Sampled calls of the drop-in: kept tokens, probabilities, frequencies, seeds; how rows end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.hf.stop_strings import StopStringSink
from hf_models import CHECKPOINTS, generated, kv_rows_of, left_padded, pair, random_ids, tolerance

FILTERS: dict[str, dict[str, Any]] = {
    "the default, top_k 50": {},
    "nothing": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.1},
    "typical_p": {"top_k": 0, "typical_p": 0.7},
    "epsilon_cutoff": {"top_k": 0, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"top_k": 0, "eta_cutoff": 0.02},
    "top_h": {"top_k": 0, "top_h": 0.5},
    "several": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "penalties": {"top_k": 20, "repetition_penalty": 1.5, "min_new_tokens": 3},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("filters", FILTERS)
def test_kept_tokens_are_transformers(name: str, filters: str) -> None:
    """Each token drawn is among those that transformers keeps, given the same beginning."""
    theirs, ours = pair(name)
    padded = left_padded(random_ids(theirs, np.random.default_rng(0), 4, 12), [0, 3, 11, 0], 3)
    call = {
        **padded,
        **FILTERS[filters],
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 12,
        "pad_token_id": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    got = generated(ours, seed=1, **call)
    if "counts padding" not in ours.last_reason:  # as transformers does until 5.17
        assert ours.last_path == "native", ours.last_reason
    ended = torch.zeros(12, dtype=torch.bool)
    eos = torch.tensor(theirs.generation_config.eos_token_id).flatten()
    for step, scores in enumerate(got.scores):
        drawn = got.sequences[:, 12 + step]
        assert scores.gather(1, drawn[:, None]).isfinite()[~ended, 0].all()
        assert (drawn[ended] == 3).all()
        ended |= torch.isin(drawn, eos)
    _assert_scores_are_theirs(theirs, got, padded, FILTERS[filters])


def _assert_scores_are_theirs(
    theirs: Any, got: Any, padded: dict[str, torch.Tensor], filters: dict[str, Any]
) -> None:
    """Kept tokens and their probabilities, step by step, of transformers' own next step behind the
    same tokens. A token whose mass ends at a filter's edge may fall on either side of it."""
    mask, moved = padded["attention_mask"].repeat_interleave(3, 0), 0
    for step in range(min(4, len(got.scores))):
        ids = got.sequences[:, : 12 + step]
        call = {"input_ids": ids, "attention_mask": mask, "do_sample": True, "max_new_tokens": 1}
        call |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 3}
        least = {"min_new_tokens": 1} if step < filters.get("min_new_tokens", 0) else {}
        [expected] = generated(
            theirs, **{**call, **filters, "min_new_tokens": None, **least}
        ).scores
        both = expected.isfinite() & got.scores[step].isfinite()
        moved += int((expected.isfinite() ^ got.scores[step].isfinite()).sum())
        assert (expected - got.scores[step])[both].abs().max() < tolerance(expected)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert moved <= 1


@pytest.mark.parametrize("filters", ["the default, top_k 50", "several", "penalties", "top_h"])
def test_frequencies_are_transformers_probabilities(filters: str) -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(2), 1, 9)
    call = {"input_ids": ids, "do_sample": True, **FILTERS[filters], "max_new_tokens": 1}
    call.pop("min_new_tokens", None)
    scores = generated(theirs, **call, return_dict_in_generate=True, output_scores=True).scores[0]
    probabilities = scores.double().softmax(-1)[0].numpy()
    drawn = generated(ours, seed=3, **call, num_return_sequences=4000)[:, -1]
    counts = np.bincount(drawn.numpy(), minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    often = probabilities * 4000 >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probabilities[often], probabilities[~often].sum()) * 4000
    if expected[-1] < 5:
        observed, expected = (
            observed[:-1],
            expected[:-1] * observed[:-1].sum() / expected[:-1].sum(),
        )
    assert chisquare(observed, expected).pvalue > 1e-4


def test_a_seed_repeats_a_call_and_only_then() -> None:
    _, ours = pair()
    call = {"input_ids": torch.tensor([[20, 30, 40]]), "do_sample": True, "max_new_tokens": 20}
    first = generated(ours, seed=5, **call, num_return_sequences=3)
    assert torch.equal(generated(ours, seed=5, **call, num_return_sequences=3), first)
    assert not torch.equal(generated(ours, seed=6, **call, num_return_sequences=3), first)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    ours.generate(**call, pad_token_id=7)
    assert not torch.equal(ours.generate(**call, num_return_sequences=3, pad_token_id=7), first)


def test_greedy_calls_leave_the_generator_alone() -> None:
    _, ours = pair()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ours.generate(torch.tensor([[20, 30]]), max_new_tokens=4, do_sample=False, pad_token_id=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_rows_alone_and_together() -> None:
    """By the engine and by transformers' loop on the decoder: the same tokens, bit for bit."""
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(7), 6, 20)
    padded = left_padded(ids, [0, 5, 19, 1, 0, 12], 7)
    call = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 7}
    together = generated(ours, **padded, **call)
    looped = generated(ours, **padded, **call, stopping_criteria=StoppingCriteriaList([_Never()]))
    assert ours.last_path == "forward" and "_Never" in ours.last_reason
    assert torch.equal(together, looped)
    for row, start in enumerate([0, 5, 19, 1, 0, 12]):
        alone = generated(ours, input_ids=ids[row : row + 1, start:], **call)[0]
        assert torch.equal(together[row, start : start + len(alone)], alone)


class _Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_beams_are_drawn_as_transformers_draws_them() -> None:
    theirs, ours = pair()
    for seed in range(10):
        ids = random_ids(theirs, np.random.default_rng(seed), 2, 8)
        call = {"input_ids": ids, "do_sample": True, "num_beams": 3, "max_new_tokens": 12}
        expected, got = (generated(m, seed=seed, **call, temperature=1.3) for m in (theirs, ours))
        assert torch.equal(expected, got) and ours.last_path == "native"


def test_max_time_ends_rows_together() -> None:
    _, ours = pair()
    ids = torch.tensor([[20, 30, 40], [50, 60, 70]])
    call = {"input_ids": ids, "do_sample": False, "eos_token_id": None, "pad_token_id": 7}
    short = generated(ours, **call, max_time=1e-9, max_new_tokens=90)
    assert ours.last_path == "native"
    assert 4 <= short.shape[1] < 80
    full = generated(ours, **call, max_new_tokens=90)
    assert torch.equal(full[:, : short.shape[1]], short)
    assert generated(ours, **call, max_time=60.0, max_new_tokens=90).shape == full.shape


def test_stop_strings() -> None:
    """At the same token as in transformers; they may begin in the prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    theirs = transformers.GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    from fastgen import accelerate

    ours = accelerate(theirs)
    prompts = ["In the beginning", "The king said to the", "It was a dark and"]
    for stops in (["the"], [" the k", "e"], [". "], ["\n", "and th"], ["zzz"]):
        for texts in (prompts[:1], prompts):
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            call = {**batch, "max_new_tokens": 30, "do_sample": False, "stop_strings": stops}
            expected, got = (generated(m, **call, tokenizer=tokenizer) for m in (theirs, ours))
            assert torch.equal(expected, got) and ours.last_path == "native"
    call = {
        **batch,
        "max_new_tokens": 4,
        "do_sample": False,
        "stop_strings": "",
        "tokenizer": tokenizer,
    }
    assert torch.equal(generated(theirs, **call), generated(ours, **call))
    without = generated(ours, **batch, max_new_tokens=3, stop_strings=["x"])
    assert isinstance(without, ValueError) and "tokenizer" in str(without)


def test_stop_string_rows_match_the_criterion() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    criterion = StopStringCriteria(tokenizer, ["the", " a", "e s", "ing", "é", "tt"])
    rng = np.random.default_rng(0)
    ids = tokenizer("then a test seeing the lattice, étude: bet the settee sing a thesis")[
        "input_ids"
    ]
    hits = 0
    for _ in range(300):
        row = rng.choice(ids, 12).tolist()
        sink = StopStringSink(criterion, row[:4])
        for end in range(5, 13):
            expected = bool(criterion(torch.tensor([row[:end]]), None)[0])
            assert sink.push(row[end - 1]) == expected
            hits += expected
    assert 100 < hits < 2000


def test_a_conversation_goes_on_from_its_cache() -> None:
    """Turn by turn with the returned cache, and without: the same tokens; most is found cached."""
    theirs, ours = pair()
    rng = np.random.default_rng(9)
    ids = random_ids(theirs, rng, 1, 5)
    cache: Any = None
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 7}
    for _ in range(4):
        call = {"input_ids": ids, **options}
        fresh = generated(theirs, **call)
        output = generated(ours, **call, past_key_values=cache, return_dict_in_generate=True)
        assert ours.last_path == "native", ours.last_reason
        cache = output.past_key_values
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        assert torch.equal(output.sequences, fresh)
        ids = torch.cat([fresh, random_ids(theirs, rng, 1, 3)], 1)
    stats = kv_rows_of(ours).engine.stats
    assert stats.reused_tokens >= 32
    with torch.no_grad():
        expected = theirs(ids[:, : cache.get_seq_length() + 1]).logits[:, -1:]
        got = ours(ids[:, cache.get_seq_length() :][:, :1], past_key_values=cache).logits
    assert (got - expected).abs().max() < tolerance(expected)


def test_only_the_new_ids_behind_a_cache() -> None:
    theirs, ours = pair()
    rng = np.random.default_rng(10)
    ids, more = random_ids(theirs, rng, 2, 6), random_ids(theirs, rng, 2, 3)
    mask = torch.ones(2, 9, dtype=torch.long)
    call = {"input_ids": more, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    outputs = []
    for model in (theirs, ours):
        with torch.no_grad():
            cache = model(ids).past_key_values
        outputs.append(generated(model, **call, past_key_values=cache, pad_token_id=7))
    assert torch.equal(*outputs) and ours.last_path == "forward"


def test_more_rows_than_seats() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(11), 300, 6)
    call = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 7}
    got, expected = generated(ours, **call), generated(theirs, **call)
    assert got.shape == expected.shape and (got != expected).any(1).sum() <= 3


def test_up_to_the_last_position_and_beyond() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(12), 1, 90)
    call = {"input_ids": ids, "do_sample": False, "eos_token_id": None, "pad_token_id": 7}
    for count in (6, 7):  # with 7, the last token is drawn behind the last position
        assert torch.equal(*(generated(m, **call, max_new_tokens=count) for m in (theirs, ours)))
    for model in (theirs, ours):
        error = generated(model, **call, max_new_tokens=8)
        assert isinstance(error, IndexError) and "index out of range" in str(error)


def test_an_eos_outside_the_vocabulary_never_comes() -> None:
    theirs, ours = pair()
    call = {"input_ids": torch.tensor([[20, 30]]), "do_sample": False, "max_new_tokens": 9}
    for eos in (50256, [50256, 7]):
        outputs = [generated(m, **call, eos_token_id=eos, pad_token_id=3) for m in (theirs, ours)]
        assert torch.equal(*outputs) and ours.last_path == "native"
