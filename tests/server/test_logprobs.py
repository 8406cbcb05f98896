"""Log-probabilities have the shapes that OpenAI's answers have, and lose no token."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

import fastgen
from fastgen.results import TokenLogprobs
from fastgen.server.logprobs import LogprobsWriter, shown_token
from json_client import call
from server_harness import MODEL, RunningServer
from text_parts import tokenizer_of
from tokenizer_folders import BUNDLED_JSON

EOS = "<|endoftext|>"
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
VOCAB: dict[str, int] = BUNDLED_JSON["model"]["vocab"]


def bytes_of(token: str) -> bytes:
    """What a token of the vocabulary stands for."""
    return bytes(BYTES[char] for char in token)


def read_back(shown: str) -> bytes:
    """What a shown token stands for, as a client reads it."""
    if not shown.startswith("bytes:"):
        return shown.encode()
    return shown.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")


def ask(server: RunningServer, **options: Any) -> Any:
    sent = {"model": MODEL, "prompt": "And", "max_tokens": 12, "seed": 1, **options}
    return call(server, "/v1/completions", sent)["choices"]


def test_every_token_of_the_vocabulary_is_shown_without_loss(model: fastgen.Generator) -> None:
    tokenizer, shown_of = tokenizer_of(model), {}
    for token, token_id in VOCAB.items():
        if token == EOS:
            continue
        shown = shown_of[token_id] = shown_token(tokenizer, token_id)
        assert read_back(shown) == bytes_of(token)
        assert shown.startswith("bytes:") == (b"\xef\xbf\xbd" in bytes_of(token).decode(
            errors="replace").encode())  # fmt: skip
    assert len({*shown_of.values()}) == len(shown_of)
    assert shown_token(tokenizer, VOCAB[EOS]) == EOS
    assert shown_token(tokenizer, VOCAB[bytes_to_unicode()[0xE2]]) == r"bytes:\xe2"
    assert shown_token(None, 7) == "token_id:7"


@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_drawn_token_is_among_the_best(
    server: RunningServer, count: int, temperature: float
) -> None:
    choices = ask(server, n=6, logprobs=count, echo=True, temperature=temperature, ignore_eos=True)
    lengths = set()
    for choice in choices:
        found = choice["logprobs"]
        assert found["top_logprobs"][0] is found["token_logprobs"][0] is None
        rows = zip(*(found[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")),
                   strict=True)  # fmt: skip
        for token, logprob, best in rows:
            assert best[token] == logprob
            assert [*best.values()] == sorted(best.values(), reverse=True)
            assert len(best) == count or (len(best), min(best.values())) == (count + 1, logprob)
            lengths.add(len(best))
    if count and temperature:
        assert lengths == {count, count + 1}, "both happen"


def test_offsets_begin_after_the_prompt(server: RunningServer, model: fastgen.Generator) -> None:
    ids = tokenizer_of(model).encode([f"é{EOS} And"])[0]
    for prompt in ("And", "é😀", f"a{EOS}b", "", ids, None):
        text = prompt if isinstance(prompt, str) else f"é{EOS} And" if prompt else ""
        [alone] = ask(server, prompt=prompt, logprobs=0)
        [echoed] = ask(server, prompt=prompt, logprobs=0, echo=True)
        assert echoed["text"] == text + alone["text"]
        offsets = alone["logprobs"]["text_offset"]
        assert offsets[0] == len(text)
        assert echoed["logprobs"]["text_offset"][-len(offsets) :] == offsets


def test_parts_of_a_character_are_told_apart(
    server: RunningServer, model: fastgen.Generator
) -> None:
    parts = [VOCAB[bytes_to_unicode()[byte]] for byte in "é".encode()]
    for prompt in ([VOCAB["a"], *parts, VOCAB["b"]], [parts[0], VOCAB["a"]], [parts[1]]):
        [choice] = ask(server, prompt=prompt, max_tokens=0, echo=True, logprobs=5)
        shown = choice["logprobs"]["tokens"]
        assert b"".join(map(read_back, shown)) == b"".join(
            tokenizer_of(model).token_bytes(token_id) for token_id in prompt
        )
        for best in choice["logprobs"]["top_logprobs"][1:]:
            assert len(best) in (5, 6)
    score = call(server, "/v1/score", {"input": "a😀"})["data"][0]
    assert b"".join(map(read_back, score["tokens"])) == "a😀".encode()


def test_entries_of_equal_text_have_keys_of_their_own(model: fastgen.Generator) -> None:
    """Ids past the vocabulary's end, as padded models have, are all without text."""
    writer = LogprobsWriter(tokenizer_of(model))
    top = tuple((5000 + i, -1.0 - i) for i in range(3))
    for chosen, count in ((5001, 3), (6000, 4)):
        writer.add([TokenLogprobs(chosen, -9.0 if count == 4 else -2.0, top)])
        taken = writer.take()
        [best] = taken["top_logprobs"]
        assert len(best) == count and best[taken["tokens"][0]] == taken["token_logprobs"][0]
        assert sorted(best.values(), reverse=True)[0] == -1.0


def test_likelihoods_are_greedy_where_they_are(server: RunningServer) -> None:
    """As lm-evaluation-harness reads them: a token is greedy if it is the best, as floats."""
    rng = random.Random(2)
    for _ in range(10):
        prompt = [rng.randrange(1, 4096) for _ in range(9)]
        sent = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        [choice] = ask(server, **sent)
        found = choice["logprobs"]
        for logprob, best in zip(found["token_logprobs"][1:], found["top_logprobs"][1:],
                                 strict=True):  # fmt: skip
            assert logprob in best.values() and len(best) <= 2
            assert not math.isnan(logprob)
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())
