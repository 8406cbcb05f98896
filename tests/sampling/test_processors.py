"""What changes logits: the definition against transformers' own classes, and the torch sampler's
against the definition. Exactly: the same float32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from fastgen import SamplingParams
from fastgen.sampling.history import RowHistory
from fastgen.sampling.processors import length_rise, processed
from fastgen.sampling.torch_processors import process
from sampling_harness import DefinedRow, random_logits, random_processors

EOS = frozenset({1, 4})


class OpenAIPenalties(hf.LogitsProcessor):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting what was generated."""

    def __init__(self, frequency: float, presence: float, prompt_len: int) -> None:
        self.frequency, self.presence, self.prompt_len = frequency, presence, prompt_len

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[0, self.prompt_len :]
        counts = torch.bincount(generated, minlength=scores.shape[1])[None].float()
        return scores - counts * self.frequency - (counts > 0) * self.presence


def biases(row: DefinedRow) -> hf.LogitsProcessor:
    """transformers has one option for biases of tokens and of sequences."""
    params = row.params
    single: dict[tuple[int, ...], float] = {
        (token_id,): bias for token_id, bias in params.logit_bias
    }
    return hf.SequenceBiasLogitsProcessor({**single, **dict(params.sequence_bias)})


def bad_words(row: DefinedRow) -> hf.LogitsProcessor | None:
    ending, words = row.ending_ids, [list(word) for word in row.params.bad_words]
    if all(len(word) == 1 and word[0] in ending for word in words):
        return None  # transformers refuses to be left without a word
    return hf.NoBadWordsLogitsProcessor(words, ending or None)


def ending(row: DefinedRow) -> torch.Tensor:
    return torch.tensor(row.ending_ids, dtype=torch.int64)


# transformers' processors for a row, in its order: option -> what it makes of its value
THEIRS: dict[str, Callable[[DefinedRow, Any], Any]] = {
    "logit_bias": lambda row, bias: biases(row),
    "sequence_bias": lambda row, bias: None if row.params.logit_bias else biases(row),
    "repetition_penalty": lambda row, value: hf.RepetitionPenaltyLogitsProcessor(value),
    "frequency_penalty": lambda row, value: OpenAIPenalties(value, 0.0, row.prompt_len),
    "presence_penalty": lambda row, value: OpenAIPenalties(0.0, value, row.prompt_len),
    "no_repeat_ngram_size": lambda row, size: hf.NoRepeatNGramLogitsProcessor(size),
    "bad_words": lambda row, _: bad_words(row),
    "min_new_tokens": lambda row, least: hf.MinNewTokensLengthLogitsProcessor(
        row.prompt_len, least, ending(row)
    ),
    "allowed_token_ids": lambda row, ids: hf.PrefixConstrainedLogitsProcessor(
        lambda batch, sent: list(ids), 1
    ),
    "exponential_decay_length_penalty": lambda row, value: hf.ExponentialDecayLengthPenalty(
        value, ending(row), row.prompt_len
    ),
    "suppress_tokens": lambda row, ids: hf.SuppressTokensLogitsProcessor(ids),
    "begin_suppress_tokens": lambda row, ids: hf.SuppressTokensAtBeginLogitsProcessor(
        ids, row.prompt_len
    ),
}


def by_transformers(row: DefinedRow, logits: np.ndarray) -> np.ndarray:
    chain = hf.LogitsProcessorList()
    for name, make in THEIRS.items():
        value = getattr(row.params, name)
        if value != getattr(SamplingParams, name) and (processor := make(row, value)) is not None:
            chain.append(processor)
    token_ids = torch.tensor(row.token_ids, dtype=torch.int64)[None]
    processed: np.ndarray = chain(token_ids, torch.from_numpy(logits.copy())[None])[0].numpy()
    return processed


def random_row(rng: np.random.Generator, vocab_size: int, options: dict[str, Any]) -> DefinedRow:
    """With a history of few different tokens, so that much of it repeats."""
    few = rng.integers(0, vocab_size, 12)
    row = DefinedRow(SamplingParams(**options), rng.choice(few, rng.integers(1, 30)).tolist(), EOS)
    row.token_ids += rng.choice(few, rng.integers(0, 8)).tolist()
    return row


def assert_changed_as_by_transformers(
    rng: np.random.Generator, vocab_size: int, options: dict[str, Any]
) -> bool:
    """Whether there was a change."""
    row = random_row(rng, vocab_size, options)
    [logits] = random_logits(rng, 1, vocab_size)
    kept = logits.copy()
    ours = processed(logits, row.params, row.state)
    np.testing.assert_array_equal(logits, kept, "the caller's logits were changed")
    np.testing.assert_array_equal(ours, by_transformers(row, logits), str(row.params))
    return not np.array_equal(ours, logits)


@pytest.mark.parametrize("name", THEIRS)
def test_each_is_transformers_own(name: str) -> None:
    rng = np.random.default_rng(len(name))
    changed = 0
    for _ in range(150):
        vocab_size = int(rng.choice([5, 17, 101, 300]))
        options: dict[str, Any] = {}
        while name not in options:
            options = random_processors(rng, vocab_size, share=0.9)
        kept = {name, "stop_token_ids", "ignore_eos"} & set(options)
        one = {option: options[option] for option in kept}
        changed += assert_changed_as_by_transformers(rng, vocab_size, one)
    assert changed > 10, "most trials changed nothing"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_chain_is_transformers_own(share: float) -> None:
    rng = np.random.default_rng(int(share * 10))
    for _ in range(300):
        vocab_size = int(rng.choice([5, 17, 101, 300]))
        options = random_processors(rng, vocab_size, share)
        assert_changed_as_by_transformers(rng, vocab_size, options)


def test_both_penalties_are_openais_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        frequency, presence = rng.normal(size=2).tolist()
        row = random_row(rng, 40, {"frequency_penalty": frequency, "presence_penalty": presence})
        [logits] = random_logits(rng, 1, 40)
        generated = row.token_ids[row.prompt_len :]
        by_hand = logits.copy()
        for token_id in set(generated):
            each = np.float32(frequency) * np.float32(generated.count(token_id))
            by_hand[token_id] = (logits[token_id] - each) - np.float32(presence)
        np.testing.assert_array_equal(processed(logits, row.params, row.state), by_hand)


def test_lengths_that_transformers_cannot_count() -> None:
    """Its factor ** tokens overflows; ours ends at a float32 that leaves room."""
    steep = SamplingParams(exponential_decay_length_penalty=(2, 1e6))
    assert length_rise(steep, 2) is None
    assert length_rise(steep, 3) == np.float32(999_999)
    assert length_rise(steep, 1000) == length_rise(steep, 30) == np.float32(1e30)
    falling = SamplingParams(exponential_decay_length_penalty=(0, 0.5))
    assert length_rise(falling, 2) == np.float32(-0.75)


@pytest.mark.parametrize("vocab_size", [5, 60, 300])
def test_torch_changes_the_same_bits(vocab_size: int) -> None:
    """Rows of different options at once, while their histories grow token by token."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(40):
        rows = [
            random_row(rng, vocab_size, random_processors(rng, vocab_size, rng.random()))
            for _ in range(6)
        ]
        histories = [RowHistory(r.params, r.token_ids[: r.prompt_len], EOS) for r in rows]
        for row, history in zip(rows, histories, strict=True):
            for token_id in row.token_ids[row.prompt_len :]:
                history.observe(token_id)
        for _ in range(4):
            assert_same_bits(rng, rows, histories, vocab_size)
            for row, history in zip(rows, histories, strict=True):
                row.token_ids.append(int(rng.choice(row.token_ids)))
                history.observe(row.token_ids[-1])


def assert_same_bits(
    rng: np.random.Generator, rows: list[DefinedRow], histories: list[RowHistory], vocab_size: int
) -> None:
    for row in rows:
        row.mask = rng.random(vocab_size) < 0.6 if rng.random() < 0.3 else None
    logits = random_logits(rng, len(rows), vocab_size)
    allowed = [allowed_by(row, vocab_size) for row in rows]
    scores = torch.from_numpy(logits.copy())
    process(scores, histories, allowed)
    for changed, raw, row in zip(scores.numpy(), logits, rows, strict=True):
        np.testing.assert_array_equal(changed, processed(raw, row.params, row.state))


def allowed_by(row: DefinedRow, vocab_size: int) -> torch.Tensor | None:
    listed = row.params.allowed_token_ids
    if listed is None:
        return None if row.mask is None else torch.from_numpy(row.mask)
    either = np.isin(np.arange(vocab_size), listed)
    return torch.from_numpy(either if row.mask is None else either & row.mask)


def test_a_row_without_such_options_keeps_nothing() -> None:
    params = SamplingParams(top_k=5, allowed_token_ids=[3], temperature=0.5, stop_token_ids=[9])
    history = RowHistory(params, [1, 2, 3], EOS)
    history.observe(4)
    assert vars(history) == {"is_plain": True}


def test_a_mask_and_a_list_must_both_allow() -> None:
    row = DefinedRow(SamplingParams(allowed_token_ids=[2, 3, 5], suppress_tokens=[3]), [0], EOS)
    row.mask = np.array([True, False, True, True, False, False])
    scores = processed(np.arange(6, dtype=np.float32), row.params, row.state)
    assert np.flatnonzero(np.isfinite(scores)).tolist() == [2]
