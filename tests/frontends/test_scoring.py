"""Scores of texts: transformers' own, windows over long texts, and the published loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastgen
from data_files import HELD_OUT
from fastgen.frontends.generator import BUNDLED_MODEL
from tolerances import TOLERANCES
from variant_cases import load_transformers, transformers_logits


@pytest.mark.parametrize("decoder", ["cpu", "torch"])
def test_score_is_transformers_log_softmax(decoder: str) -> None:
    text = HELD_OUT.read_text()[:3000]
    with fastgen.load(decoder=decoder, max_batch_size=1) as model:
        [score] = model.score([text])
    peer = load_transformers(BUNDLED_MODEL, torch.float32)
    [logits] = transformers_logits(peer, [list(score.token_ids)])
    expected = torch.from_numpy(logits).double().log_softmax(1)[:-1]
    wanted = expected[torch.arange(len(expected)), torch.tensor(score.token_ids[1:])].numpy()
    assert score.logprobs[0] is None
    found = np.array(score.logprobs[1:])
    assert np.abs(found - wanted).max() < 5 * TOLERANCES["logprob"]
    assert score.windows == 1
    assert score.perplexity == pytest.approx(np.exp(-wanted.mean()), rel=1e-5)


def test_score_of_long_texts_in_windows(idle_model: fastgen.Generator) -> None:
    text = HELD_OUT.read_text()[:12_000]
    [score] = idle_model.score([text])
    count, context = len(score.token_ids), 1024
    assert count > 2 * context
    assert score.windows > 1
    assert score.num_scored == count - 1
    [first] = idle_model.score([score.token_ids[:context]])
    assert score.logprobs[:context] == pytest.approx(first.logprobs, abs=1e-4)
    [last] = idle_model.score([score.token_ids[-context:]])
    assert score.logprobs[-100:] == pytest.approx(last.logprobs[-100:], abs=1e-4)


def test_the_held_out_loss_is_the_published_one(idle_model: fastgen.Generator) -> None:
    """3.186 nats a token over windows of 256 tokens, as the training script measures it."""
    assert idle_model.tokenizer is not None
    chapters = HELD_OUT.read_text().split("<|endoftext|>")
    ids = [i for encoded in idle_model.tokenizer.encode(chapters) for i in (0, *encoded)]
    windows = [ids[at : at + 257] for at in range(0, len(ids) - 256, 257)]
    scores = idle_model.score(windows)
    loss = -sum(s.total_logprob for s in scores) / sum(s.num_scored for s in scores)
    assert loss == pytest.approx(3.186, abs=0.001)


def test_short_scores_and_forms(idle_model: fastgen.Generator) -> None:
    empty, one, two = idle_model.score(["", [5], [5, 6]])
    assert (empty.logprobs, one.logprobs) == ((), (None,))
    assert np.isnan(one.perplexity)
    assert two.num_scored == 1
    assert idle_model.score("God")[0].token_ids == idle_model.score(["God"])[0].token_ids
