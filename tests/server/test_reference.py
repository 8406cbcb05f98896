"""Every field of OpenAI's completions reference: null, absent, and each value at its bounds."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.completion_create_params import CompletionCreateParamsStreaming

import fastgen
from fastgen.server.completions import OTHERS, SAMPLING
from json_client import call, exchange
from server_harness import MODEL, RunningServer

TEXT = "And it came to pass"
# The reference's values at the bounds of each field, and the forms that it lists.
REFERENCE: dict[str, list[Any]] = {
    "model": [MODEL],
    "prompt": [None, "", "a", ["a"], ["a", ""], [1], [[1]], [[1, 2], [3]]],
    "best_of": [None, 0, 1, 20],
    "echo": [None, False, True],
    "frequency_penalty": [None, -2, -2.0, 0, 2],
    "logit_bias": [None, {}, {"256": -100}, {"256": 100, "0": 1}],
    "logprobs": [None, 0, 5],
    "max_tokens": [None, 0, 1, 16],
    "n": [None, 1, 128],
    "presence_penalty": [None, -2, 0, 2.0],
    "seed": [None, -(2**63), -1, 0, 2**63 - 1],
    "stop": [None, "\n", ["\n"], ["a", "b", "c", "d"]],
    "stream": [None, False],
    "stream_options": [None],
    "suffix": [None],
    "temperature": [None, 0, 5e-324, 1e-9, 1e-6, 1, 2],
    "top_p": [None, 0, 0.0, 5e-324, 0.5, 1],
    "user": [None, "", "user-1234"],
}
STREAM_OPTIONS: list[Any] = [
    None, {}, {"include_usage": None}, {"include_usage": False}, {"include_usage": True},
    {"include_obfuscation": None}, {"include_obfuscation": True, "include_usage": None},
]  # fmt: skip


def body(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": TEXT, "max_tokens": 2, "temperature": 0, "seed": 3} | options


def test_the_table_has_the_fields_of_openais_client() -> None:
    fields = CompletionCreateParamsStreaming.__required_keys__
    fields |= CompletionCreateParamsStreaming.__optional_keys__
    assert fields == {*REFERENCE}
    assert fields <= {*SAMPLING, *OTHERS}


@pytest.mark.parametrize("name", REFERENCE)
def test_what_the_reference_allows_is_accepted(server: RunningServer, name: str) -> None:
    for value in REFERENCE[name]:
        status, answer, _ = exchange(server, body(**{name: value}))
        assert status == 200, (name, value, answer)


@pytest.mark.parametrize("name", [*SAMPLING, *OTHERS])
def test_a_field_that_is_null_counts_as_absent(server: RunningServer, name: str) -> None:
    absent = {field: value for field, value in body().items() if field != name}
    [without] = call(server, "/v1/completions", absent)["choices"]
    [null] = call(server, "/v1/completions", body(**{name: None}))["choices"]
    if name == "seed":  # it is drawn, and the text is greedy
        assert without.pop("seed") != null.pop("seed")
    assert null == without


@pytest.mark.parametrize("options", STREAM_OPTIONS, ids=str)
def test_options_of_streams(client: openai.OpenAI, options: Any) -> None:
    stream = client.completions.create(**body(), stream=True, stream_options=options)
    *_, last = stream
    has_usage = bool(options and options.get("include_usage"))
    assert (last.usage is not None) == has_usage == (not last.choices)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_prompt_a_new_document_begins(
    model: fastgen.Generator, client: openai.OpenAI, stream: bool
) -> None:
    [wanted] = model.generate("", max_new_tokens=9, seed=3, logprobs=0)
    options = {"max_tokens": 9, "seed": 3, "logprobs": 0, "echo": True, "stream": stream}
    for prompt in (None, openai.omit, ""):
        answer: Any = client.completions.create(
            model=MODEL, prompt=prompt, **options  # type: ignore[call-overload]
        )  # fmt: skip
        events = list(answer) if stream else [answer]
        choices = [choice for event in events for choice in event.choices]
        assert "".join(choice.text for choice in choices) == wanted.text
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        assert tokens[0] == "<|endoftext|>" and "".join(tokens[1:]) == wanted.text
        if not stream:
            assert answer.usage.prompt_tokens == 1


def test_no_new_tokens_need_no_echo(server: RunningServer) -> None:
    answer = call(server, "/v1/completions", body(max_tokens=0, n=2))
    assert [choice["text"] for choice in answer["choices"]] == ["", ""]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0


def test_a_negative_seed_is_its_64_bits(server: RunningServer) -> None:
    sent = body(temperature=1, max_tokens=12)
    for seed in (-1, -7, -(2**63)):
        [negative] = call(server, "/v1/completions", sent | {"seed": seed})["choices"]
        [positive] = call(server, "/v1/completions", sent | {"seed": seed + 2**64})["choices"]
        assert negative == positive and negative["seed"] == seed + 2**64


@pytest.mark.parametrize("options", [{"top_p": 0}, {"temperature": 1e-9}, {"temperature": 5e-324}])
def test_the_most_likely_token_is_left(server: RunningServer, options: dict[str, Any]) -> None:
    [greedy] = call(server, "/v1/completions", body(max_tokens=30))["choices"]
    sent = {"temperature": 2, **options, "max_tokens": 30}
    for seed in range(3):
        for others in ({}, {"typical_p": 0.1}, {"top_k": 7, "min_p": 0.1}):
            answer = call(server, "/v1/completions", body(**sent, seed=seed, **others))
            assert answer["choices"][0]["text"] == greedy["text"]
