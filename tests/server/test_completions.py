"""The server through openai's client: in every form, every option gives bit for bit
what the same model generates here; and the paths beside completions."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from openai.resources import Completions

import fastgen
from fastgen import SamplingParams
from fastgen.results import Completion, Generation, TokenLogprobs
from fastgen.server.completions import OTHERS, SAMPLING
from fastgen.server.logprobs import shown_token
from json_client import call, opened
from server_harness import MODEL, RunningServer
from text_parts import tokenizer_of

TEXT = "And it came to pass in those days, that"
BESIDE = "In the beginning"
PART = 128  # a token that is the first byte of a character of two
# The rest goes into extra_body, and so does "timeout", which in openai's client is its own.
KNOWN = set(inspect.signature(Completions.create).parameters) - {"timeout"}
CASES: list[dict[str, Any]] = [
    {}, {"max_tokens": 5}, {"n": 3}, {"best_of": 2, "n": 2}, {"best_of": 5, "n": 2},
    {"best_of": 3, "logprobs": 1}, {"echo": True}, {"echo": True, "n": 2, "logprobs": 2},
    {"echo": True, "max_tokens": 0}, {"echo": True, "max_tokens": 0, "logprobs": 4},
    {"logprobs": 0}, {"logprobs": 5, "n": 2}, {"stop": "the", "max_tokens": 60},
    {"stop": ["no such text", ",", "and"], "max_tokens": 60, "logprobs": 1},
    {"stop": ["the", "And"], "include_stop": True, "max_tokens": 60}, {"seed": 2**64 - 1},
    {"seed": -1}, {"seed": -(2**63), "logprobs": 3}, {"temperature": 0}, {"temperature": 0.3},
    {"temperature": 1e-9}, {"top_p": 0.4}, {"top_p": 0, "n": 2}, {"top_p": 0, "temperature": 2},
    {"max_tokens": 0}, {"max_tokens": 0, "logprobs": 2, "n": 2}, {"best_of": 0, "n": 2},
    {"presence_penalty": 2, "max_tokens": 60}, {"frequency_penalty": -2, "max_tokens": 60},
    {"logit_bias": {"11": 100}}, {"user": "somebody"}, {"suffix": ""},
    {"stop": None, "suffix": None, "logprobs": None, "top_k": None},
    {"stream_options": {"include_usage": True, "include_obfuscation": False}, "stream": True},
    {"min_tokens": 12, "stop_token_ids": [11, 13, 256, 260, 262, 264]},
    {"sequence_bias": {"11": 50.5, "11,256": 40}}, {"repetition_penalty": 3.5, "max_tokens": 60},
    {"no_repeat_ngram_size": 1, "max_tokens": 60}, {"bad_words": ["the", [11], "and"]},
    {"allowed_token_ids": [256, 257, 258, 259, 260]},
    {"exponential_decay_length_penalty": [2, 3.5], "max_tokens": 60},
    {"suppress_tokens": [11, 256, 257, 258, 259, 260, 262, 264]},
    {"begin_suppress_tokens": list(range(256, 1280))}, {"top_h": 0.2}, {"top_k": 2},
    {"min_p": 0.5}, {"typical_p": 0.2}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.5},
    {"stop_token_ids": [11, 13, 256, 260], "max_tokens": 60}, {"top_n_sigma": 0.5},
    {"ignore_eos": True, "logit_bias": {"0": 100}, "logprobs": 1},
    {"timeout": 60.5, "priority": 3, "cache_salt": "mine"}, {"return_token_ids": True, "n": 2},
    {"add_special_tokens": False}, {"add_special_tokens": True},
    {"speculate": False, "max_tokens": 60},
]  # fmt: skip
INERT = {*OTHERS, "n", "speculate"}  # without these the model is not asked for other tokens


def arguments(prompt: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What openai's `create` is called with."""
    options = {"seed": 7, **options}
    extra = {name: options.pop(name) for name in set(options) - KNOWN}
    return {"model": MODEL, "prompt": prompt, **options, "extra_body": extra}


def params_of(options: dict[str, Any]) -> SamplingParams:
    """What the protocol's options stand for."""
    given = {"seed": 7, "max_tokens": 16}
    given |= {name: value for name, value in options.items() if value is not None}
    for name in set(OTHERS) - {"logprobs", "echo"}:
        given.pop(name, None)
    given["seed"] %= 2**64
    if given.get("top_p") == 0 or given.get("temperature", 1) < 1e-6:
        given.pop("top_p", None)
        given["temperature"] = 0  # the most likely token
    if given.get("best_of") == 0:
        del given["best_of"]
    ours = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    params: dict[str, Any] = {ours.get(name, name): value for name, value in given.items()}
    if biases := params.get("logit_bias"):
        params["logit_bias"] = {int(key): bias for key, bias in biases.items()}
    if biases := params.get("sequence_bias"):
        params["sequence_bias"] = {tuple(map(int, k.split(","))): b for k, b in biases.items()}
    if params.pop("echo", False) and "logprobs" in params:
        params["prompt_logprobs"] = params["logprobs"]
    elif not params["max_new_tokens"]:
        params["prompt_logprobs"] = 0
    return SamplingParams(**params)


def choices_of(
    model: fastgen.Generator, prompts: list[Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The choices that these prompts should have; in a stream seeds are not told."""
    expected: list[dict[str, Any]] = []
    for prompt, generation in zip(
        prompts, model.generate(prompts, params_of(options)), strict=True
    ):
        text = text_of(model, prompt)
        for completion in generation.completions:
            echoed = options.get("echo", False)
            expected.append({
                "index": len(expected),
                "text": (text if echoed else "") + completion.text,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                **({} if options.get("stream") else {"seed": completion.seed}),
                **({"token_ids": [*completion.token_ids]} if "return_token_ids" in options else {}),
                "logprobs": None if options.get("logprobs") is None
                else logprobs_of(model, generation if echoed else None, completion),
            })  # fmt: skip
    return expected


def text_of(model: fastgen.Generator, prompt: Any) -> str:
    """As its caller wrote it; ids with special tokens written out."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer_of(model).decode(prompt, skip_special_tokens=False)


def lengths_before(
    model: fastgen.Generator, prompts: list[Any], options: dict[str, Any]
) -> list[int]:
    """For each choice, the characters of its prompt that it does not show."""
    lengths = [0 if options.get("echo") else len(text_of(model, prompt)) for prompt in prompts]
    return [length for length in lengths for _ in range(options.get("n", 1))]


def logprobs_of(
    model: fastgen.Generator, echoed: Generation | None, completion: Completion
) -> dict[str, Any]:
    def name(token_id: int) -> str:
        return shown_token(model.tokenizer, token_id)

    own: list[tuple[int, TokenLogprobs | None]] = []
    if echoed is not None and echoed.prompt_logprobs is not None:
        own += zip(echoed.prompt_token_ids, echoed.prompt_logprobs, strict=True)
    own += zip(completion.token_ids, completion.logprobs or (), strict=True)
    return {
        "tokens": [name(token_id) for token_id, _ in own],
        "token_logprobs": [at and at.logprob for _, at in own],
        "top_logprobs": [
            at and {name(i): value for i, value in (*at.top, (token_id, at.logprob))}
            for token_id, at in own
        ],
    }


def found_in(choices: Iterable[Any], before: list[int]) -> list[dict[str, Any]]:
    return [without_offsets(choice.model_dump(), before) for choice in choices]


def without_offsets(choice: dict[str, Any], before: list[int]) -> dict[str, Any]:
    """The offsets, which are checked by themselves, taken away."""
    if (logprobs := choice["logprobs"]) is not None:
        offsets = [at - before[choice["index"]] for at in logprobs.pop("text_offset")]
        assert offsets[:1] in ([], [0]), "the first token stands where the text begins"
        assert_offsets_fit(choice["text"], logprobs, offsets)
    return choice


def assert_offsets_fit(text: str, logprobs: dict[str, Any], offsets: list[int]) -> None:
    """Each token stands where its offset says; those of a stop string, behind the text."""
    assert len(offsets) == len(logprobs["tokens"]) and offsets == sorted(offsets)
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if not token.startswith("bytes:") and token != "<|endoftext|>":
            shown = text[offset : offset + len(token)]
            assert token.startswith(shown)
            assert shown == token or offset + len(token) > len(text)


def joined(events: Iterable[Any], before: list[int]) -> list[dict[str, Any]]:
    """Whole choices of a stream's events."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in (choice.model_dump() for choice in event.choices):
            whole = choices.setdefault(piece["index"], {**piece, "text": "", "logprobs": None})
            assert whole["finish_reason"] is None or not whole["text"], "it went on after its end"
            whole["text"] += piece["text"]
            if whole is not piece and piece.get("token_ids") is not whole.get("token_ids"):
                whole["token_ids"] += piece["token_ids"]
            whole |= {name: piece[name] for name in ("finish_reason", "stop_reason")
                      if name in piece}  # fmt: skip
            for name, values in (piece["logprobs"] or {}).items():
                whole["logprobs"] = whole["logprobs"] or defaultdict(list)
                whole["logprobs"][name] += values
    return [without_offsets(choices[index], before) for index in sorted(choices)]


def test_the_cases_hold_every_option_and_each_acts(model: fastgen.Generator) -> None:
    named = {name for case in CASES for name in case} | {"model", "prompt"}
    assert named == {*SAMPLING, *OTHERS}
    acting = set()
    for case in CASES:
        for name in case.keys() - INERT:
            less = {other: value for other, value in case.items() if other != name}
            if choices_of(model, [TEXT], case) != choices_of(model, [TEXT], less):
                acting.add(name)
    assert acting == set(SAMPLING) - INERT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_option_means_what_it_means_to_the_model(
    model: fastgen.Generator, client: openai.OpenAI, case: dict[str, Any]
) -> None:
    before = lengths_before(model, [TEXT], case)
    if not case.get("stream"):
        answer = client.completions.create(**arguments(TEXT, case))
        assert found_in(answer.choices, before) == choices_of(model, [TEXT], case)
    if case.get("best_of", 0) in (0, case.get("n", 1)):
        case = {**case, "stream": True}
        events = list(client.completions.create(**arguments(TEXT, case)))
        assert joined(events, before) == choices_of(model, [TEXT], case)
        [one] = {(event.id, event.model, event.object) for event in events}
        assert one[1:] == (MODEL, "text_completion")


def test_the_asynchronous_client_gets_the_same_of_many_at_once(
    model: fastgen.Generator, server: RunningServer
) -> None:
    async def ask(client: openai.AsyncOpenAI, case: dict[str, Any]) -> list[dict[str, Any]]:
        before = lengths_before(model, [TEXT, BESIDE], case)
        answer = await client.completions.create(**arguments([TEXT, BESIDE], case))
        if case.get("stream"):
            return joined([event async for event in answer], before)
        return found_in(answer.choices, before)

    async def ask_all() -> list[list[dict[str, Any]]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, case) for case in CASES))

    for case, found in zip(CASES, asyncio.run(ask_all()), strict=True):
        assert found == choices_of(model, [TEXT, BESIDE], case), case


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompts",
    ["", "é😀\n", [TEXT], [TEXT, "", BESIDE], [301, 40], [[301, 40]], [[301], [40, 50, 60], []],
     "a<|endoftext|>b", [301, PART], [[PART], [0, 301]]],
    ids=str,
)  # fmt: skip
def test_prompts_in_every_form(
    model: fastgen.Generator, client: openai.OpenAI, prompts: Any, stream: bool
) -> None:
    each = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
    for echo in (False, True):
        options = {"n": 2, "logprobs": 1, "echo": echo, "temperature": 0.6, "stream": stream}
        expected, before = choices_of(model, each, options), lengths_before(model, each, options)
        answer = client.completions.create(**arguments(prompts, options))
        if stream:
            assert joined(answer, before) == expected
        else:
            assert found_in(answer.choices, before) == expected
            lengths = [len(g.prompt_token_ids) for g in model.generate(each, max_new_tokens=1)]
            assert answer.usage.prompt_tokens == sum(lengths)


def test_usage_counts_every_prompt_once_and_every_completion(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "max_tokens": 7, "ignore_eos": True}
    prompts = [[1, 2, 3], [4, 5]]
    wanted = {"prompt_tokens": 5, "completion_tokens": 42, "total_tokens": 47}
    answer = client.completions.create(**arguments(prompts, options))
    assert wanted.items() <= answer.usage.model_dump().items()
    streamed = {**options, "stream": True}
    assert all(e.usage is None for e in client.completions.create(**arguments(prompts, streamed)))
    streamed["stream_options"] = {"include_usage": True}
    *events, last = client.completions.create(**arguments(prompts, streamed))
    assert all(event.usage is None and event.choices for event in events)
    assert last.choices == [] and wanted.items() <= last.usage.model_dump().items()


def test_an_answer_has_what_openais_has_and_says_how_to_repeat_it(
    model: fastgen.Generator, client: openai.OpenAI
) -> None:
    answer = client.completions.create(model=MODEL, prompt=TEXT)
    [choice] = answer.choices
    assert answer.object == "text_completion" and answer.model == MODEL
    assert answer.id.startswith("cmpl-") and answer.created > 1_700_000_000
    assert answer.usage is not None and choice.model_extra is not None
    assert answer.model_extra == {} and answer.usage.model_extra == {}
    assert set(choice.model_extra) == {"stop_reason", "seed"}
    [again] = model.generate(TEXT, seed=choice.model_extra["seed"], max_new_tokens=16)
    assert again.text == choice.text
    unnamed = client.completions.create(model="", prompt=TEXT, max_tokens=1)
    assert unnamed.model == MODEL


def test_a_stream_is_events_of_json_and_ends_with_done(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": TEXT, "stream": True, "max_tokens": 4, "ignore_eos": True}
    with opened(server, "/v1/completions", body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    ends = [event["choices"][0]["finish_reason"] for event in events]
    assert ends == [None] * (len(ends) - 1) + ["length"]


def test_what_may_become_a_stop_string_is_never_shown(
    model: fastgen.Generator, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    [plain] = choices_of(model, [TEXT], options)
    for begin in range(0, 60, 7):
        stop = plain["text"][begin : begin + 15]
        wanted = plain["text"].partition(stop)[0]
        shown = ""
        streamed = {**options, "stop": [stop, "\x00"], "stream": True}
        for event in client.completions.create(**arguments(TEXT, streamed)):
            shown += event.choices[0].text
            assert wanted.startswith(shown)
        assert shown == wanted and event.choices[0].finish_reason == "stop"
        assert event.choices[0].model_extra == {"stop_reason": stop}


def test_a_timeout_ends_what_is_generated_and_shows_what_there_is(
    model: fastgen.Generator, client: openai.OpenAI
) -> None:
    options = {"max_tokens": 900, "ignore_eos": True, "temperature": 0}
    [whole] = choices_of(model, [TEXT], options)
    answer = client.completions.create(**arguments(TEXT, {**options, "timeout": 0.1}))
    [choice] = answer.choices
    assert choice.finish_reason == "timeout" and answer.usage.completion_tokens < 900
    assert whole["text"].startswith(choice.text)


def test_models(model: fastgen.Generator, client: openai.OpenAI) -> None:
    [listed] = client.models.list().data
    assert listed == client.models.retrieve(MODEL)
    assert listed.id == MODEL and listed.object == "model" and listed.owned_by == "fastgen"
    assert listed.model_extra == {"max_model_len": 1024}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


def test_there_are_neither_chat_nor_embeddings(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.embeddings.create(model=MODEL, input="Hi")


def test_scores_of_texts_are_the_models(model: fastgen.Generator, server: RunningServer) -> None:
    texts = [TEXT, "A", "word " * 700]
    found = call(server, "/v1/score", {"input": texts, "cache_salt": "x", "timeout": 60})
    scores = model.score(texts)
    assert [item["logprobs"] for item in found["data"]] == [list(s.logprobs) for s in scores]
    assert [item["windows"] for item in found["data"]] == [score.windows for score in scores]
    assert found["data"][0]["total_logprob"] == scores[0].total_logprob
    assert found["data"][0]["perplexity"] == pytest.approx(scores[0].perplexity)
    assert found["data"][1]["perplexity"] is None
    assert "".join(found["data"][0]["tokens"]) == TEXT
    assert found["usage"]["prompt_tokens"] == sum(len(score.token_ids) for score in scores)
    [alone] = call(server, "/v1/score", {"model": MODEL, "input": TEXT})["data"]
    assert alone == found["data"][0]


def test_scores_of_labels_stand_behind_the_prompt(
    model: fastgen.Generator, server: RunningServer
) -> None:
    labels = [" pass", " the sea of Galilee", " zebra"]
    found = call(server, "/v1/score", {"prompt": "And it came to", "labels": labels})
    assert found["best"] == 0 and [item["label"] for item in found["data"]] == labels
    start = tokenizer_of(model).encode(["And it came to"])[0]
    for item, own in zip(found["data"], tokenizer_of(model).encode(labels), strict=True):
        [score] = model.score([start + own])
        assert item["token_ids"] == own and item["logprobs"] == list(score.logprobs[len(start) :])
        assert item["total_logprob"] == math.fsum(item["logprobs"])


def test_the_openapi_document_names_what_is_accepted(server: RunningServer) -> None:
    document = call(server, "/openapi.json")
    fields = schema(document, "/v1/completions")
    assert fields.keys() == {*SAMPLING, *OTHERS}
    assert fields["n"]["maximum"] == 128 and fields["temperature"]["maximum"] == 2
    assert fields["logprobs"]["maximum"] == 5 and "1024" in fields["max_tokens"]["description"]
    for name, field in fields.items():
        for bound in ("minimum", "maximum"):
            if bound in field:
                body = {"prompt": TEXT, "echo": True, "max_tokens": 2, name: field[bound]}
                call(server, "/v1/completions", body)
    for path in ("/v1/score", "/tokenize", "/detokenize"):
        assert schema(document, path)["model"] == {"type": "string", "enum": [MODEL]}


def schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    properties: dict[str, Any] = content["application/json"]["schema"]["properties"]
    return properties
