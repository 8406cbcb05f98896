"""Random calls of `generate` without sampling: the tokens, scores and errors of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_models import CHECKPOINTS, generated, left_padded, pair, random_ids, tolerance

LONG = pytest.mark.slow
# Seeds, and how many calls each gives; of each checkpoint.
CALLS = [(1, 80), pytest.param(3, 120, marks=LONG)]
BEAM_CALLS = [(2, 40), pytest.param(4, 60, marks=LONG)]
Options = dict[str, Any]
Rng = np.random.Generator


def _some_ids(rng: Rng, vocab_size: int, count: int) -> list[int]:
    found: list[int] = rng.integers(0, vocab_size, count).tolist()
    return found


def _random_options(rng: Rng, vocab_size: int) -> Options:
    """Some of the options that change logits or end rows."""
    ids: Callable[[int], list[int]] = lambda count: _some_ids(rng, vocab_size, count)  # noqa: E731
    choices: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: float(rng.uniform(0.7, 1.8)),
        "no_repeat_ngram_size": lambda: int(rng.integers(1, 4)),
        "bad_words_ids": lambda: [ids(int(n)) for n in rng.integers(1, 3, 6)],
        "sequence_bias": lambda: {
            tuple(ids(int(n))): float(rng.normal(0, 4)) for n in rng.integers(1, 3, 4)
        },
        "min_length": lambda: int(rng.integers(1, 25)),
        "min_new_tokens": lambda: int(rng.integers(1, 12)),
        "suppress_tokens": lambda: ids(9),
        "begin_suppress_tokens": lambda: ids(9),
        "forced_eos_token_id": lambda: ids(1)[0],
        "exponential_decay_length_penalty": lambda: (int(rng.integers(0, 6)), 1.3),
        "renormalize_logits": lambda: True,
        "remove_invalid_values": lambda: True,
        "eos_token_id": lambda: ids(int(rng.integers(2, 15))),
        "encoder_repetition_penalty": lambda: 1.3,
        "use_cache": lambda: False,
        "prefill_chunk_size": lambda: 5,
    }
    names = rng.choice(list(choices), size=int(rng.integers(0, 5)), replace=False)
    return {str(name): choices[name]() for name in names}


def _random_call(rng: Rng, model: Any) -> Options:
    batch_size, length = int(rng.integers(1, 5)), int(rng.integers(1, 40))
    ids = random_ids(model, rng, batch_size, length, special=bool(rng.integers(2)))
    pads = [0] * batch_size
    if rng.integers(2):
        pads = [int(rng.integers(0, length)) for _ in pads]
    padded = left_padded(ids, pads, int(rng.integers(0, 8)))
    options = _random_options(rng, model.config.vocab_size)
    if options.get("use_cache") is False:
        options.pop("prefill_chunk_size", None)
    return {
        **padded,
        "max_new_tokens": int(rng.integers(1, 30)),
        "pad_token_id": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "do_sample": False,
        **options,
    }


def _plain(call: Options) -> Options:
    outputs = ("return_dict_in_generate", "output_scores", "output_logits")
    return {name: value for name, value in call.items() if name not in outputs}


def _assert_same_greedy(theirs: Any, ours: torch.Tensor, call: Options) -> int:
    """Equal, up to where a row's best two scores were nearer than the tolerance; how many were."""
    length, excused = call["input_ids"].shape[1], 0
    for row, (expected, got) in enumerate(zip(theirs.sequences, ours, strict=True)):
        shared = min(len(expected), len(got))
        different = (expected[:shared] != got[:shared]).nonzero()
        if not len(different):
            continue
        step = int(different[0]) - length
        best = theirs.scores[step][row].topk(2).values
        assert best[0] - best[1] < tolerance(theirs.logits[step][row]), (row, step, call)
        excused += 1
    if not excused:
        assert theirs.sequences.shape == ours.shape
    return excused


def _both_results(theirs: Any, ours: Any, call: Options) -> tuple[Any, Any] | None:
    """transformers' and fastgen's; None where both have raised the same, and where transformers
    has scores of NaN: until 5.17 it adds infinities of both signs."""
    expected, got = generated(theirs, **call), generated(ours, **call)
    if isinstance(expected, Exception):
        assert type(got) is type(expected) and str(got) == str(expected), call
        return None
    assert not isinstance(got, Exception), (got, call)
    return None if any(scores.isnan().any() for scores in expected.scores) else (expected, got)


@pytest.mark.parametrize(("seed", "count"), CALLS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_calls(name: str, seed: int, count: int) -> None:
    theirs, ours = pair(name)
    rng = np.random.default_rng(seed)
    paths: list[str] = []
    excused = 0
    for _ in range(count):
        call = _random_call(rng, theirs)
        both = _both_results(theirs, ours, call)
        if both is None:
            continue
        expected, got = both
        paths.append(ours.last_path)
        excused += _assert_same_greedy(expected, got.sequences, call)
        if torch.equal(expected.sequences, got.sequences):
            _assert_near(expected.scores, got.scores, call)
            _assert_near(expected.logits, got.logits, call)
            assert (got.past_key_values is None) == (expected.past_key_values is None)
        short = generated(ours, **_plain(call))
        assert torch.equal(short, got.sequences), call
    assert excused <= len(paths) // 20
    assert len(paths) > count * 3 // 4 and paths.count("native") > len(paths) // 3
    assert "transformers" not in paths


def _assert_near(expected: Any, got: Any, call: Options) -> None:
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        ruled_out = one == -torch.inf
        assert torch.equal(ruled_out, other == -torch.inf), call
        finite = ~ruled_out
        difference = (one[finite] - other[finite]).abs().max() if finite.any() else 0
        assert difference < tolerance(one), call


@pytest.mark.parametrize(("seed", "count"), BEAM_CALLS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_calls_with_beams(name: str, seed: int, count: int) -> None:
    theirs, ours = pair(name)
    rng = np.random.default_rng(seed)
    paths: list[str] = []
    different = 0
    for _ in range(count):
        beams = int(rng.integers(2, 6))
        call = {
            **_random_call(rng, theirs),
            "num_beams": beams,
            "num_return_sequences": int(rng.integers(1, beams + 1)),
            "length_penalty": float(rng.choice([0.0, 0.7, 1.0, 2.0, -0.5])),
            "early_stopping": [True, False, "never"][rng.integers(3)],
        }
        both = _both_results(theirs, ours, call)
        if both is None:
            continue
        expected, got = both
        paths.append(ours.last_path)
        if torch.equal(expected.sequences, got.sequences):
            assert torch.allclose(expected.sequences_scores, got.sequences_scores, atol=1e-3)
            assert torch.equal(expected.beam_indices, got.beam_indices)
        else:
            different += 1
            _assert_beams_were_close(expected, got, call)
    assert different <= len(paths) // 20
    assert len(paths) > count * 3 // 4 and set(paths) == {"native", "forward"}


def _assert_beams_were_close(expected: Any, got: Any, call: Options) -> None:
    """Another beam won: then its score is as good, but for the tolerance."""
    size = max(expected.scores[0].abs().nan_to_num(posinf=0).max().item(), 1.0)
    gap = (expected.sequences_scores - got.sequences_scores).abs().max()
    assert gap < 1e-3 * size, call
