"""Text to ids and back, with the bundled model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fastgen.frontends.generator import BUNDLED_MODEL
from fastgen.text.detokenizer import TextSink
from fastgen.text.tokenizer import Tokenizer

TOKENS = 512  # of a text that is decoded
TEXTS = {"short": (1, 50), "many short": (64, 50), "long": (1, 20_000)}  # texts, characters each
STOPS = {"no stop string": (), "a stop string": ("\n\n\n",)}  # which never comes


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    opened = Tokenizer.from_folder(BUNDLED_MODEL)
    assert opened is not None
    return opened


@pytest.fixture
def some_ids(
    tokenizer: Tokenizer, held_out: str, rng: np.random.Generator
) -> Callable[[], list[int]]:
    """TOKENS ids of held-out text, from anywhere in it."""
    [every] = tokenizer.encode([held_out])

    def make() -> list[int]:
        start = int(rng.integers(0, len(every) - TOKENS))
        return every[start : start + TOKENS]

    return make


@pytest.mark.parametrize("texts", TEXTS)
def test_encode(
    texts: str,
    tokenizer: Tokenizer,
    held_out: str,
    rng: np.random.Generator,
    timed: Any,
    describe: Any,
) -> None:
    count, length = TEXTS[texts]
    made: list[list[str]] = []

    def make() -> list[str]:
        starts = rng.integers(0, len(held_out) - length, count)
        made.append([held_out[start : start + length] for start in starts])
        return made[-1]

    timed(tokenizer.encode, make, group="tokenizer: encode", rounds=100)
    encoded = [tokenizer.encode(batch) for batch in made]
    for batch, ids in zip(made, encoded, strict=True):
        assert [tokenizer.decode(each) for each in ids] == batch
    tokens = sum(len(each) for ids in encoded for each in ids) / len(made)
    describe(texts=count, characters=count * length, tokens=round(tokens, 1))


@pytest.mark.parametrize("stop", STOPS)
def test_sink(
    stop: str,
    tokenizer: Tokenizer,
    some_ids: Callable[[], list[int]],
    timed: Any,
    describe: Any,
) -> None:
    """Token by token, as a row's text is made while it is generated."""

    def push_all(work: tuple[TextSink, Sequence[int]]) -> tuple[TextSink, Sequence[int]]:
        sink, ids = work
        for token_id in ids:
            sink.push(token_id)
        sink.finish()
        return work

    def make() -> tuple[TextSink, Sequence[int]]:
        return tokenizer.sink(STOPS[stop]), some_ids()

    sink, ids = timed(push_all, make, group="tokenizer: decode", rounds=100)
    assert sink.text == tokenizer.decode(ids) and sink.stop_reason is None
    describe(tokens=TOKENS)


def test_decode(
    tokenizer: Tokenizer, some_ids: Callable[[], list[int]], timed: Any, describe: Any
) -> None:
    """All at once."""
    made: list[list[int]] = []

    def make() -> list[int]:
        made.append(some_ids())
        return made[-1]

    text = timed(tokenizer.decode, make, group="tokenizer: decode", rounds=100)
    sink = tokenizer.sink()
    for token_id in made[-1]:
        sink.push(token_id)
    sink.finish()
    assert text == sink.text
    describe(tokens=TOKENS)
