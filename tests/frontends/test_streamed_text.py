"""From end to end: what the bundled model streams is what it returns, with stop strings or not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers

import fastgen
from fastgen.frontends.generator import BUNDLED_MODEL

LIBRARY = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
PROMPT = "And God said unto"


def streamed(model: fastgen.Generator, **options: Any) -> list[tuple[str, fastgen.Piece]]:
    """Text and last piece of each completion."""
    pieces = list(model.stream(PROMPT, **options))
    by_index = [[p for p in pieces if p.index == i] for i in range(options.get("n", 1))]
    return [("".join(map(str, each)), each[-1]) for each in by_index]


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """`text` up to the stop string that ends first (the longest of those), and that string."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include_stop else end - len(stop)], stop


@pytest.mark.parametrize("temperature", [0.8, 4.0])
def test_stream_is_what_generate_returns(idle_model: fastgen.Generator, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 24, "n": 2}
    texts = []
    for seed in range(2):
        completions = idle_model.generate(PROMPT, seed=seed, **options)[0].completions
        texts += [completion.text for completion in completions]
        assert [text for text, _ in streamed(idle_model, seed=seed, **options)] == texts[-2:]
        assert texts[-2:] == [LIBRARY.decode(completion.token_ids) for completion in completions]
    assert any("\ufffd" in text for text in texts) == (temperature > 1)  # invalid bytes came too


@pytest.mark.parametrize("temperature", [0.8, 4.0])
@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_strings_that_occur(
    idle_model: fastgen.Generator, temperature: float, include_stop: bool
) -> None:
    rng = random.Random(7)
    for seed in range(2):
        options: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_new_tokens": 24}
        [whole] = idle_model.generate(PROMPT, **options)
        starts = rng.sample(range(len(whole.text) - 8), 2)
        stops = [whole.text[start : start + rng.randint(1, 6)] for start in starts]
        expected, reason = naive(whole.text, stops, include_stop)
        options |= {"stop": stops, "include_stop": include_stop}
        [completion] = idle_model.generate(PROMPT, **options)[0].completions
        [(text, last)] = streamed(idle_model, **options)
        assert text == completion.text == expected
        assert last.stop_reason == completion.stop_reason == reason
        assert last.finish_reason == completion.finish_reason == "stop"


def test_stop_strings_that_do_not_occur_change_nothing(idle_model: fastgen.Generator) -> None:
    options: dict[str, Any] = {"seed": 3, "temperature": 0.8, "max_new_tokens": 24}
    [whole] = idle_model.generate(PROMPT, **options)
    never = [whole.text[-3:] + "!?", whole.text + "!", "你好", whole.text[5:9] + "\0"]
    [(text, last)] = streamed(idle_model, stop=never, **options)
    assert (text, last.finish_reason) == (whole.text, whole.completions[0].finish_reason)
