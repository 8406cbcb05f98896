"""Text that options hold: bad_words as strings."""

from __future__ import annotations

import re
from typing import Any

import pytest

import fastgen
from fastgen import SamplingParams
from fastgen.frontends.codec import RequestCodec


def ids_of(model: fastgen.Generator, *params: SamplingParams) -> list[SamplingParams]:
    return list(RequestCodec(model.config, model.tokenizer).params_of_ids(params))


def test_a_bad_word_is_its_tokens_as_it_is_and_behind_a_space(model: fastgen.Generator) -> None:
    assert model.tokenizer is not None
    plain, spaced = map(tuple, model.tokenizer.encode(["king", " king"]))
    assert plain != spaced
    params = SamplingParams(bad_words=["king", [5, 6], " king", "king"])
    [found] = ids_of(model, params)
    [two_spaces] = map(tuple, model.tokenizer.encode(["  king"]))
    assert found.bad_words == ((5, 6), plain, spaced, two_spaces)
    assert found == SamplingParams(bad_words=[[5, 6], plain, spaced, two_spaces])


def test_what_holds_no_text_stays_the_same(model: fastgen.Generator) -> None:
    params = SamplingParams(bad_words=[[5, 6]])
    shared = SamplingParams(bad_words="x")
    first, second, third = ids_of(model, params, shared, shared)
    assert first is params
    assert second is third, "one given for many prompts is encoded once"


def test_bad_words_never_come(idle_model: fastgen.Generator) -> None:
    """Drawn in the decoder, and on the host."""
    prompt = "And the LORD said unto"
    options: dict[str, Any] = {"temperature": 0.7, "seed": 1, "max_new_tokens": 40, "n": 4}
    [free] = idle_model.generate(prompt, **options)
    said = " ".join(completion.text for completion in free.completions)
    words = {"the", "Moses", "LORD", "him"} & set(re.findall(r"\w+", said))
    assert words, "else nothing is shown"
    for function in (None, lambda token_ids, logits: None):
        [clean] = idle_model.generate(
            prompt, bad_words=sorted(words), logits_processor=function, **options
        )
        for completion in clean.completions:
            assert completion.error is None
            assert not words & set(re.findall(r"\w+", completion.text))


def test_without_a_tokenizer_text_is_refused(model: fastgen.Generator) -> None:
    border = RequestCodec(model.config, None)
    with pytest.raises(ValueError, match="bad_words holds text, but this model has no tokenizer"):
        list(border.params_of_ids([SamplingParams(bad_words="x")]))
    ids = SamplingParams(bad_words=[[1]])
    assert list(border.params_of_ids([ids])) == [ids]
    with pytest.raises(ValueError, match="no tokenizer; give token ids"):
        border.token_ids(["x"])
    with pytest.raises(ValueError, match="stop strings need text"):
        border.sinks(SamplingParams(stop="x"))
