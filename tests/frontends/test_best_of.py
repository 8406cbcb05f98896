"""best_of and rank: which completions come back, in what order, and what a bad rank does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fastgen
from fastgen import Completion, SamplingParams, TokenLogprobs
from fastgen.frontends.ranking import best

OPTIONS: dict[str, Any] = {"seed": 4, "max_new_tokens": 8, "temperature": 1.3}


def completion(index: int, *logprobs: float, error: str | None = None) -> Completion:
    scored = tuple(TokenLogprobs(1, logprob) for logprob in logprobs)
    return Completion(
        index, "", (1,) * len(scored), "error" if error else "length", None, index, scored, error
    )


def indices(chosen: Any) -> list[int]:
    return [each.index for each in chosen]


def test_the_mean_log_probability_a_token_decides() -> None:
    drawn = (
        completion(0, -1.0, -3.0),  # -2
        completion(1),  # without a token: the worst that is no error
        completion(2, -1.5),
        completion(3, -0.1, error="broken"),
        completion(4, -2.0),  # equal to 0, which comes first
    )
    assert indices(best(drawn, SamplingParams(n=1, best_of=5))) == [2]
    assert indices(best(drawn, SamplingParams(n=4, best_of=5))) == [2, 0, 4, 1]
    assert indices(best(drawn, SamplingParams(n=5, best_of=5))) == [2, 0, 4, 1, 3]
    assert best(drawn, SamplingParams(n=5)) is drawn


def test_rank_decides_instead() -> None:
    drawn = tuple(completion(index, -float(index)) for index in range(4))
    seen: list[Any] = []

    def rank(completions: Any) -> list[Any]:
        seen.append(completions)
        return [1, 5, 5, np.float32(9)]

    assert indices(best(drawn, SamplingParams(n=3, best_of=4, rank=rank))) == [3, 1, 2]
    assert seen == [drawn]
    assert indices(best(drawn, SamplingParams(n=4, best_of=4, rank=rank))) == [3, 1, 2, 0]
    array: Any = np.arange(4.0)
    assert indices(best(drawn, SamplingParams(n=1, best_of=4, rank=lambda c: array))) == [3]
    flags: list[Any] = [False, True, np.False_, True]
    yes_or_no = SamplingParams(n=2, best_of=4, rank=lambda c: flags)
    assert indices(best(drawn, yes_or_no)) == [1, 3]
    rejected = SamplingParams(n=3, best_of=4, rank=lambda c: [-math.inf, 1, 2, -math.inf])
    assert indices(best(drawn, rejected)) == [2, 1, 0]


def raises(completions: Any) -> list[float]:
    raise KeyError("mine")


BAD_RANKS: dict[str, tuple[Any, str]] = {
    "raises": (raises, "rank failed: KeyError: 'mine'"),
    "too few": (lambda c: [1.0], "rank failed: ValueError: 1 scores for 3 completions"),
    "too many": (lambda c: [1.0] * 4, "rank failed: ValueError: 4 scores"),
    "nothing": (lambda c: None, "rank failed: ValueError: 0 scores"),
    "a number": (lambda c: 3, "rank failed: TypeError: what rank returns must be a sequence"),
    "a string": (lambda c: "abc", "rank failed: TypeError"),
    "NaN": (lambda c: [1.0, math.nan, 2.0], "rank failed: ValueError: a score must be finite"),
    "strings": (lambda c: ["1", "2", "3"], "rank failed: TypeError: a score must be a number"),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_a_bad_rank_hurts_its_own_prompt_only(idle_model: fastgen.Generator, name: str) -> None:
    rank, message = BAD_RANKS[name]
    params = [SamplingParams(n=2, best_of=3, rank=rank, **OPTIONS), SamplingParams(**OPTIONS)]
    bad, fine = idle_model.generate(["In the beginning"] * 2, params)
    assert len(bad.completions) == 2
    assert {(each.finish_reason, each.stop_reason) for each in bad.completions} == {("error", None)}
    assert all(
        each.error is not None and each.error.startswith(message) for each in bad.completions
    )
    assert fine.completions[0].error is None


def test_generate_returns_the_best_of_what_n_would_have_drawn(
    idle_model: fastgen.Generator,
) -> None:
    [every] = idle_model.generate("And the king said", n=6, logprobs=0, **OPTIONS)
    [chosen] = idle_model.generate("And the king said", n=2, best_of=6, **OPTIONS)

    def mean(each: Completion) -> float:
        assert each.logprobs is not None
        return float(np.mean([entry.logprob for entry in each.logprobs]))

    expected = sorted(every.completions, key=mean, reverse=True)[:2]
    assert indices(chosen.completions) == indices(expected)
    for found, wanted in zip(chosen.completions, expected, strict=True):
        assert (found.token_ids, found.text, found.seed) == (
            wanted.token_ids, wanted.text, wanted.seed,
        )  # fmt: skip
        assert found.logprobs is None, "nobody asked for them"
    [shown] = idle_model.generate("And the king said", n=2, best_of=6, logprobs=1, **OPTIONS)
    assert shown.completions[0].logprobs is not None
    assert len(shown.completions[0].logprobs[0].top) == 1
    [again] = idle_model.generate("And the king said", **OPTIONS | {"seed": expected[0].seed})
    assert again.completions[0].token_ids == expected[0].token_ids


def test_rank_sees_finished_completions_with_log_probabilities(
    idle_model: fastgen.Generator,
) -> None:
    def longest(completions: tuple[Completion, ...]) -> list[float]:
        assert all(each.finish_reason and each.logprobs for each in completions)
        return [len(each.text) for each in completions]

    options = OPTIONS | {"n": 2, "best_of": 5, "rank": longest}
    [generation] = idle_model.generate("And it came to pass", **options)
    [every] = idle_model.generate("And it came to pass", n=5, **OPTIONS)
    by_length = sorted(every.completions, key=lambda each: -len(each.text))
    assert indices(generation.completions) == indices(by_length[:2])
    assert generation.text == by_length[0].text


def test_functions_and_best_of_go_together(idle_model: fastgen.Generator) -> None:
    """Rows drawn on the host keep log-probabilities, too; one that fails is the worst."""
    calls = iter(range(1000))

    def fails_once(token_ids: Any, logits: Any) -> None:
        if next(calls) == 3:
            raise ValueError("once")

    options = OPTIONS | {"n": 3, "best_of": 3 + 1, "logits_processor": fails_once}
    [generation] = idle_model.generate("And it came", **options)
    assert [each.error for each in generation.completions] == [None] * 3


def test_streams_cannot_choose(idle_model: fastgen.Generator) -> None:
    for best_of in (2, 3):
        with pytest.raises(ValueError, match="best_of chooses when all completions are there"):
            idle_model.stream("x", n=2, best_of=best_of)
