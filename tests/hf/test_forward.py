"""`forward` of the drop-in: transformers' logits, loss, gradients and caches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache

from engine_harness import check_blocks
from fastgen.hf.cache import BlockCache
from hf_models import (
    CHECKPOINTS,
    fresh_pair,
    kv_rows_of,
    left_padded,
    num_used_blocks,
    pair,
    random_ids,
    tolerance,
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < tolerance(theirs)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 90])
def test_logits(name: str, length: int) -> None:
    theirs, ours = pair(name)
    ids = random_ids(theirs, np.random.default_rng(length), 3, length)
    assert_near(ours(ids).logits, theirs(ids).logits)
    assert ours.last_path == "forward" and not ours.last_reason


def test_more_rows_and_logits_than_a_step_takes() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 200, 7)
    output = ours(ids)
    assert_near(output.logits, theirs(ids).logits)
    more = random_ids(theirs, np.random.default_rng(1), 200, 1)
    expected = theirs(torch.cat([ids, more], 1)).logits[:, -1:]
    assert_near(ours(more, past_key_values=output.past_key_values).logits, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logits_to_keep": 1},
        {"logits_to_keep": 3},
        {"logits_to_keep": torch.tensor([4, 1, 5])},
        {"logits_to_keep": torch.tensor([6, 5])},
        {"logits_to_keep": torch.tensor([6, 6])},
        {"logits_to_keep": torch.arange(6, -1, -1)},
        {"position_ids": torch.tensor([[3, 4, 5, 9, 9, 2, 0]])},
        {"position_ids": torch.arange(14).view(2, 7)},
        {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 1]] * 2), "logits_to_keep": 2},
        {"attention_mask": torch.tensor([[0.0, 0, 1, 1, 1, 1, 1]] * 2), "logits_to_keep": 4},
        {"use_cache": False},
    ],
)
def test_arguments(arguments: dict[str, Any]) -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 7)
    expected, got = theirs(ids, **arguments), ours(ids, **arguments)
    assert ours.last_path == "forward", ours.last_reason
    assert_near(got.logits, expected.logits)
    assert (got.past_key_values is None) == (expected.past_key_values is None)


def test_positional_arguments_and_tuples() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 7)
    mask = torch.ones_like(ids)
    expected = theirs(ids, None, mask, return_dict=False)
    got = ours(ids, None, mask, return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(expected) == 2
    assert_near(got[0], expected[0])


def test_loss() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    expected, got = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert ours.last_path == "forward"
    assert got.loss == pytest.approx(expected.loss.item(), abs=1e-5)
    assert_near(got.logits, expected.logits)


@pytest.mark.parametrize(
    ("why", "arguments"),
    [
        ("logits of padding", {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2)}),
        ("logits of padding", {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)}),
        ("output_hidden_states", {"output_hidden_states": True}),
        ("token_type_ids", {"token_type_ids": torch.tensor([[1, 2, 3, 2, 1]] * 2)}),
        ("another kind of cache", {"past_key_values": DynamicCache()}),
        ("attention_mask", {"attention_mask": torch.zeros(2, 1, 5, 5).float()}),
    ],
)
def test_what_is_left_to_transformers(why: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 5)
    expected = theirs(ids, **copy.deepcopy(arguments))
    got = ours(ids, **arguments)
    assert ours.last_path == "transformers" and why in ours.last_reason
    assert torch.equal(got.logits, expected.logits)
    if "past_key_values" in arguments:
        assert got.past_key_values is arguments["past_key_values"]
    if "output_hidden_states" in arguments:
        assert len(got.hidden_states) == len(expected.hidden_states)


def test_input_embeddings_are_left_to_transformers() -> None:
    theirs, ours = pair()
    embeddings = theirs.transformer.wte(torch.tensor([[12, 13, 14]]))
    expected = theirs(inputs_embeds=embeddings).logits
    assert torch.equal(ours(inputs_embeds=embeddings).logits, expected)
    assert "input" in ours.last_reason


def test_a_padded_batch_continued_from_its_cache() -> None:
    theirs, ours = pair()
    rng = np.random.default_rng(3)
    padded = left_padded(random_ids(theirs, rng, 3, 40), [0, 7, 38], 3)
    outputs = [model(**padded, logits_to_keep=1) for model in (theirs, ours)]
    mask = padded["attention_mask"]
    for _ in range(4):
        more = random_ids(theirs, rng, 3, int(rng.integers(1, 5)))
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        outputs = [
            model(more, attention_mask=mask, past_key_values=output.past_key_values)
            for model, output in zip((theirs, ours), outputs, strict=True)
        ]
        assert ours.last_path == "forward"
        assert_near(outputs[1].logits, outputs[0].logits)


def test_a_cache_turns_into_tensors_where_transformers_needs_them() -> None:
    theirs, ours = pair()
    rng = np.random.default_rng(4)
    ids, more = random_ids(theirs, rng, 2, 6), random_ids(theirs, rng, 2, 2)
    expected = theirs(ids).past_key_values
    cache = ours(ids).past_key_values
    assert isinstance(cache, BlockCache) and isinstance(cache, DynamicCache)
    assert len(cache) == len(expected) and not cache.is_compileable
    hidden = theirs(more, past_key_values=expected, output_hidden_states=True).hidden_states
    got = ours(more, past_key_values=cache, output_hidden_states=True)
    assert ours.last_path == "transformers"
    assert_near(got.hidden_states[-1], hidden[-1])
    for one, other in zip(cache.layers, expected.layers, strict=True):
        assert_near(one.keys, other.keys)
        assert_near(one.values, other.values)
    assert cache.get_seq_length() == 8
    assert_near(
        ours(more, past_key_values=cache).logits, theirs(more, past_key_values=expected).logits
    )


def test_a_mask_that_changes_later() -> None:
    """transformers' mask may hide what was seen before; that cannot be done with blocks."""
    theirs, ours = pair()
    rng = np.random.default_rng(5)
    ids, more = random_ids(theirs, rng, 2, 6), random_ids(theirs, rng, 2, 1)
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2)
    first, second = theirs(ids).past_key_values, ours(ids).past_key_values
    expected = theirs(more, attention_mask=mask, past_key_values=first).logits
    assert_near(ours(more, attention_mask=mask, past_key_values=second).logits, expected)
    assert ours.last_path == "transformers"


def test_indices_out_of_range_raise_as_in_transformers() -> None:
    theirs, ours = pair()
    for ids in (torch.tensor([[1, 211]]), torch.tensor([[-1, 2]]), torch.ones(1, 97).long()):
        for model in (theirs, ours):
            with pytest.raises(IndexError, match="index out of range"):
                model(ids)
    cache = ours(torch.ones(1, 96).long()).past_key_values
    with pytest.raises(IndexError, match="position 96, of a model with 96"):
        ours(torch.ones(1, 1).long(), past_key_values=cache)
    assert cache.get_seq_length() == 96


def _random_change(rng: np.random.Generator, length: int, rows: int) -> tuple[str, Any]:
    change = rng.choice(
        ["crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave"]
    )
    if change == "crop":
        return change, -int(rng.integers(0, length))
    if change == "batch_repeat_interleave":
        return change, 2 if rows < 4 else 1
    count = rows if change == "reorder_cache" else int(rng.integers(1, rows + 1))
    return str(change), torch.from_numpy(rng.integers(0, rows, count))


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed >= 6 else ()) for seed in range(25)]
)
def test_random_changes_of_a_cache(seed: int) -> None:
    """Crop, reorder, select, repeat and copy, between forwards: as transformers' own cache."""
    theirs, ours = pair("plain" if seed % 2 else "odd sizes, pad of its own")
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 4))
    padded = left_padded(
        random_ids(theirs, rng, rows, 35), [int(rng.integers(0, 34)) for _ in range(rows)], 3
    )
    mask = padded["attention_mask"]
    caches = [m(**padded, logits_to_keep=1).past_key_values for m in (theirs, ours)]
    for _ in range(8):
        length = caches[0].get_seq_length()
        if length > 60 or rng.random() < 0.4:
            change, argument = _random_change(rng, length, len(mask))
            for cache in caches:
                getattr(cache, change)(argument)
            if change == "crop":
                mask = mask[:, : caches[0].get_seq_length()]
            elif change == "batch_repeat_interleave":
                mask = mask.repeat_interleave(argument, 0)
            else:
                mask = mask[argument]
        elif rng.random() < 0.2:
            caches = [copy.deepcopy(cache) for cache in caches]
        assert caches[1].get_seq_length() == caches[0].get_seq_length()
        more = random_ids(theirs, rng, len(mask), int(rng.integers(1, 4)))
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        logits = [
            model(more, attention_mask=mask, past_key_values=cache).logits
            for model, cache in zip((theirs, ours), caches, strict=True)
        ]
        assert ours.last_path == "forward", ours.last_reason
        assert_near(logits[1], logits[0])
    check_blocks(kv_rows_of(ours).engine)
    del caches, cache
    assert num_used_blocks(ours) == 0


def test_a_copy_keeps_its_tokens_while_the_other_goes_on() -> None:
    theirs, ours = pair()
    rng = np.random.default_rng(6)
    ids, left, right = (random_ids(theirs, rng, 1, n) for n in (10, 3, 3))
    cache = ours(ids).past_key_values
    twin = copy.deepcopy(cache)
    ours(left, past_key_values=cache)
    expected = theirs(torch.cat([ids, right], 1)).logits[:, -3:]
    assert_near(ours(right, past_key_values=twin).logits, expected)
    assert cache.token_ids.tolist() == torch.cat([ids, left], 1).tolist()


def test_equal_rows_are_computed_once() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(7), 1, 40).repeat(5, 1)
    output = ours(ids, logits_to_keep=1)
    assert num_used_blocks(ours) == 2
    assert_near(output.logits, theirs(ids, logits_to_keep=1).logits)
    more = random_ids(theirs, np.random.default_rng(8), 5, 1)
    expected = theirs(torch.cat([ids, more], 1)).logits[:, -1:]
    assert_near(ours(more, past_key_values=output.past_key_values).logits, expected)
    assert num_used_blocks(ours) == 6  # the first is shared still


def test_a_pickled_cache_is_transformers_own() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(9), 2, 6)
    loaded = pickle.loads(pickle.dumps(ours(ids).past_key_values))
    assert type(loaded) is DynamicCache
    more = random_ids(theirs, np.random.default_rng(10), 2, 1)
    expected = theirs(torch.cat([ids, more], 1)).logits[:, -1:]
    assert_near(theirs(more, past_key_values=loaded).logits, expected)


def test_cropping_nothing_and_too_much() -> None:
    _, ours = pair()
    cache = ours(torch.ones(1, 6).long()).past_key_values
    cache.crop(0)
    assert cache.get_seq_length() == 6
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    cache.reset()
    assert ours(torch.ones(2, 3).long(), past_key_values=cache).logits.shape[0] == 2


def test_hooks_and_other_modules_are_respected() -> None:
    """What somebody put between the layers happens: then transformers computes."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(11), 2, 6)
    before = ours(ids).logits
    handle = ours.transformer.h[1].register_forward_hook(lambda module, args, output: output * 2)
    doubled = ours(ids).logits
    assert ours.last_path == "transformers" and (doubled - before).abs().max() > 0.1
    assert "forward hook" in ours.last_reason
    handle.remove()
    assert torch.equal(ours(ids).logits, before)
    ours.lm_head = torch.nn.Sequential(ours.lm_head, torch.nn.Tanh())
    assert ours(ids).logits.abs().max() <= 1
    assert ours.last_path == "transformers" and "lm_head is a Sequential" in ours.last_reason


def test_a_model_that_cannot_be_run_is_left_to_transformers() -> None:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=8, n_head=2, n_layer=1, activation_function="mish"
    )
    from fastgen import GPT2LMHeadModel

    model = GPT2LMHeadModel(config).eval()
    output = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, eos_token_id=None)
    assert output.shape == (1, 5) and model.last_path == "transformers"
    assert "activation_function" in model.last_reason


def test_autocast_traces_and_models_without_memory() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(12), 2, 6)
    compiled: Any = torch.compile(ours, backend="eager")  # before anything has been packed
    assert_near(compiled(ids).logits, theirs(ids).logits)
    assert_near(ours(ids).logits, theirs(ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(ids).logits.dtype == theirs(ids).logits.dtype == torch.bfloat16
    weights = dict(ours.named_parameters())
    got = torch.func.functional_call(ours, weights, (ids,)).logits
    assert_near(got, theirs(ids).logits)
    assert copy.deepcopy(ours).to("meta")(ids.to("meta")).logits.shape == (2, 6, 211)


def test_a_forward_that_is_broken_off_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = fresh_pair()
    rng = np.random.default_rng(13)
    ids, more = random_ids(theirs, rng, 3, 40), random_ids(theirs, rng, 3, 50)
    cache = ours(ids).past_key_values
    decoder = kv_rows_of(ours).decoder
    forward, calls = decoder.forward, []

    def interrupted(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(batch)

    monkeypatch.setattr(decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours(more, past_key_values=cache)
    monkeypatch.undo()
    assert cache.get_seq_length() == 40 and num_used_blocks(ours) == 6
    expected = theirs(torch.cat([ids, more], 1)).logits[:, -50:]
    assert_near(ours(more, past_key_values=copy.deepcopy(cache)).logits, expected)
    assert_near(ours(more, past_key_values=cache).logits, expected)
    del cache
    assert num_used_blocks(ours) == 0
