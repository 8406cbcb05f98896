"""Gradients, dropout and a fine-tuning: as with transformers' own class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fastgen
from fastgen.frontends.generator import BUNDLED_MODEL
from hf_models import fresh_pair, generated, random_ids


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients(mode: str) -> None:
    """In training they come from transformers' forward; in evaluation the logits are fastgen's, and
    backward computes the rest."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(4), 2, 20)
    for model in (theirs, ours):
        getattr(model, mode)()
        torch.manual_seed(0)
        loss = model(ids, labels=ids).loss + model(ids, logits_to_keep=2).logits.square().mean()
        loss.backward()
    assert ours.last_path == ("transformers" if mode == "train" else "forward")
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        size = float(one.grad.abs().max())
        assert (one.grad - other.grad).abs().max() <= 1e-4 * size + 1e-6


def test_gradients_behind_a_cache() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(5), 2, 12)
    for model in (theirs, ours):
        first = model(ids[:, :8])
        second = model(ids[:, 8:], past_key_values=first.past_key_values)
        second.logits.square().mean().backward()
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        size = float(one.grad.abs().max())
        assert (one.grad - other.grad).abs().max() <= 1e-4 * size + 1e-6


def test_backward_refuses_weights_changed_since() -> None:
    _, ours = fresh_pair()
    loss = ours(torch.tensor([[20, 21, 22]])).logits.sum()
    with torch.no_grad():
        ours.transformer.wte.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_active_dropout_is_transformers_own() -> None:
    """In training mode without gradients, too: the same random numbers give the same results."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(5), 2, 9)
    call = {"input_ids": ids, "max_new_tokens": 9, "do_sample": False}
    steady = generated(ours, **call)
    for model in (theirs, ours):
        model.transformer.h[1].train()
    assert torch.equal(*(generated(model, seed=4, **call) for model in (theirs, ours)))
    assert ours.last_path == "transformers" and ours.last_reason == "dropout is active"
    ours.train()
    theirs.train()
    logits = []
    with torch.no_grad():
        for model in (theirs, ours):
            torch.manual_seed(0)
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    ours.eval()
    assert torch.equal(generated(ours, **call), steady) and ours.last_path == "native"


def test_frozen_weights_need_no_graph() -> None:
    _, ours = fresh_pair()
    ours.requires_grad_(False)
    assert ours(torch.tensor([[20, 21, 22]])).logits.grad_fn is None


def test_a_short_fine_tuning_teaches_it_a_text(tmp_path: Path) -> None:
    """The script is written for transformers: only the import differs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = fastgen.GPT2LMHeadModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    batch = tokenizer("To be, or not to be, that is the question.", return_tensors="pt")
    prompt = batch["input_ids"][:, :4]
    call = {"input_ids": prompt, "max_new_tokens": batch["input_ids"].shape[1] - 4}
    before = generated(model, do_sample=False, **call)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(25):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0] / 4
    learnt = generated(model, do_sample=False, **call)
    assert torch.equal(learnt, batch["input_ids"]) and not torch.equal(before, learnt)
    model.save_pretrained(tmp_path)
    again = fastgen.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(generated(again, do_sample=False, **call), learnt)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(generated(theirs, do_sample=False, **call), learnt)


def test_a_prefix_without_gradients_is_a_constant() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(9), 2, 12)
    for model in (theirs, ours):
        with torch.no_grad():
            cache = model(ids[:, :8]).past_key_values
        model(ids[:, 8:], past_key_values=cache).logits.square().mean().backward()
    assert ours.last_path == "forward"
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4 * float(one.grad.abs().max()) + 1e-6


def test_gradients_of_gradients() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(10), 1, 8)
    penalties = []
    for model in (theirs, ours):
        model.set_attn_implementation("eager")  # the only one that can be differentiated twice
        weight = model.transformer.h[0].mlp.c_fc.weight
        loss = model(ids).logits.square().mean()
        [grad] = torch.autograd.grad(loss, [weight], create_graph=True)
        model.zero_grad()
        torch.autograd.backward(10 * grad.square().sum())
        penalties.append(weight.grad)
    size = float(penalties[0].abs().max())
    assert size > 1e-4 and (penalties[0] - penalties[1]).abs().max() < 1e-3 * size
