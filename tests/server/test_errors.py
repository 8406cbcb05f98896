"""What is wrong with a request is said in OpenAI's form: which field, and what would be right; and
never what is inside, nor what others asked. Whatever came before, the next request is exact.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

import fastgen
from engine_harness import assert_idle
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.server.limits import ServerLimits
from fastgen.server.service import Keys
from json_client import assert_names_of_the_protocol, checked, exchange, refusal
from server_harness import MODEL, RunningServer, serving
from text_parts import detokenizer_of, tokenizer_of
from waits import WITHIN, wait_until

HUGE = 10**400
NO_BOOLS: list[Any] = [0, 1, "true", [], {}]
NO_COUNTS: list[Any] = [-1, True, 1.0, 1.5, "1", [], {}, 10**12, HUGE]
NO_NUMBERS: list[Any] = [True, "1", [1], {}, HUGE, -HUGE]
NO_IDS: list[Any] = [5, True, "1", {}, [-1], [True], ["1"], [1.5], [None], [[1]], [4096], [HUGE]]
LONE = "\ud800"  # half of a character
# Of each field, values that it cannot have.
BAD: dict[str, list[Any]] = {
    "model": [5, True, ["bundled"], {}],
    "prompt": [5, True, 1.5, {}, [], [None], [True], [1.5], [1, "a"], ["a", 1], ["a", ["b"]],
               [[1], "b"], [["b"]], [[[1]]], [[True]], [-1], [4096], [HUGE], ["a"] * 129,
               [1] * 1024, [[1], [4096]], "a " * 3000, [[1], [1] * 1024]],
    "max_tokens": NO_COUNTS,
    "min_tokens": [*NO_COUNTS, 4],
    "n": [*NO_COUNTS, 0, 129],
    "best_of": [*NO_COUNTS, 21],
    "stream": NO_BOOLS,
    "stream_options": [{"include_usage": True}, [], 5, "x"],
    "logprobs": [*NO_COUNTS, 6],
    "echo": NO_BOOLS,
    "suffix": ["x", 5, True],
    "user": [5, True, [], {}],
    "timeout": [*NO_NUMBERS, 0, -1, 601],
    "priority": [*NO_COUNTS, 1001],
    "cache_salt": [5, True, "", LONE, []],
    "stop": [5, True, {}, "", [""], ["a", 5], ["a", "a", "b", "c", "d", "e"], "x" * 257, LONE],
    "seed": [-(2**63) - 1, True, 1.0, "1", [], 2**64, HUGE],
    "temperature": [*NO_NUMBERS, -1, -1e-9, 2.01, 1e7],
    "top_p": [*NO_NUMBERS, -0.1, 1.01],
    "presence_penalty": [*NO_NUMBERS, 2.01, -2.01],
    "frequency_penalty": [*NO_NUMBERS, 2.01, -2.01],
    "logit_bias": [5, "x", [], [[5, 1]], {"a": 1}, {"": 1}, {"4096": 1}, {"-1": 1}, {"05": 1},
                   {" 5": 1}, {"1_0": 1}, {"٥": 1}, {"1.5": 1}, {"9" * 5000: 1}, {"5": 100.5},
                   {"5": "1"}, {"5": None}, {"5": True}, {"5": HUGE},
                   {str(token_id): 1 for token_id in range(1025)}],
    "sequence_bias": [5, [], {"": 1}, {"1,": 1}, {"1,4096": 1}, {"1 2": 1}, {"1": "1"},
                      {"1": -100.5}],
    "return_token_ids": [1, "yes", []],
    "add_special_tokens": [1, "yes", []],
    "repetition_penalty": [*NO_NUMBERS, 0, -1, 1e7],
    "no_repeat_ngram_size": NO_COUNTS,
    "bad_words": [5, True, {}, [5], [[]], [""], "", [["a"]], [[4096]], [[True]], [None], [LONE],
                  ["x " * 2000], ["x" * 99_999]],
    "allowed_token_ids": [*NO_IDS, [], list(range(1025))],
    "exponential_decay_length_penalty": [5, "ab", {}, [], [1], [1, 2, 3], [-1, 1], [1, 0], [1, "x"],
                                         [1.5, 1], [True, 1], [1, HUGE]],
    "suppress_tokens": [*NO_IDS, list(range(1025))],
    "begin_suppress_tokens": [*NO_IDS, list(range(1025))],
    "top_h": [*NO_NUMBERS, 0, -1, 1.01],
    "top_k": NO_COUNTS,
    "min_p": [*NO_NUMBERS, -0.1, 1.1],
    "typical_p": [*NO_NUMBERS, 0, 1.1],
    "epsilon_cutoff": [*NO_NUMBERS, -0.1, 1],
    "eta_cutoff": [*NO_NUMBERS, -0.1, 1],
    "stop_token_ids": [*NO_IDS, list(range(129))],
    "include_stop": NO_BOOLS,
    "ignore_eos": NO_BOOLS,
    "speculate": NO_BOOLS,
}  # fmt: skip
# Names that are none, and what their error says.
UNKNOWN = {
    "temprature": "did you mean 'temperature'?",
    "max_new_tokens": "unknown option 'max_new_tokens'; did you mean 'max_tokens'?",
    "Prompt": "did you mean 'prompt'?",
    "messages": "known options: ",
    "logits_processor": "unknown option 'logits_processor'",
    "rank": "unknown option 'rank'",
    "prompt_logprobs": "did you mean 'logprobs'?",
    "": "unknown option ''",
    LONE: "unknown option",
    "x" * 2_000_000: "unknown option 'xxx",
}
NOT_JSON = [
    b"", b"{", b"nonsense", b"null", b"[]", b'"And"', b"5", b'{"prompt": "And"', b"\xff\xfe{}",
    b'{"prompt": "\xff"}', b"\xef\xbb\xbf{}", b"{'prompt': 'And'}", b'{"prompt": "And",}',
    b'{"prompt": "And", "temperature": NaN}', b'{"prompt": "And", "temperature": Infinity}',
    b'{"prompt": "And", "temperature": -Infinity}', b'{"prompt": "And", "temperature": 1e400}',
    b'{"prompt": "And", "prompt": "Or"}', b'{"prompt": "And"} {}', b'{"prompt": "A\nnd"}',
    b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", b"[" * 100_000,
    b'{"prompt": "And", "seed": ' + b"9" * 5000 + b"}",
]  # fmt: skip
ELSEWHERE: dict[str, list[Any]] = {
    "/v1/score": [
        {}, {"input": []}, {"input": 5}, {"input": [5]}, {"input": ["a"] * 129}, {"input": [[1]]},
        {"input": "a", "prompt": "b"}, {"prompt": "a"}, {"labels": ["a"]}, {"input": LONE},
        {"prompt": "a", "labels": []}, {"prompt": "a", "labels": [5]},
        {"prompt": 5, "labels": ["a"]},
        {"input": "a", "labels": ["b"]}, {"input": "a", "timeout": 0}, {"input": "a", "model": 5},
        {"input": "a", "cache_salt": 5}, {"input": "a", "max_tokens": 5},
        {"input": "word " * 70_000},
    ],
    "/tokenize": [{}, {"prompt": None}, {"prompt": 5}, {"prompt": ["a"]}, {"prompt": LONE},
                  {"prompt": "a", "text": "b"}, {"prompt": "a", "model": 5},
                  {"prompt": "a", "add_special_tokens": "yes"},
                  {"prompt": "a", "add_special_tokens": 0}],
    "/detokenize": [{}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [4096]}, {"tokens": [True]},
                    {"tokens": [1.5]}, {"tokens": [None]}, {"tokens": [[1]]}, {"tokens": [HUGE]},
                    {"tokens": [1], "ids": []}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def canary(model: fastgen.Generator, server: RunningServer) -> Iterator[None]:
    """Afterwards the same request has the same answer, and nothing is left of what was refused."""
    yield
    status, answer, _ = exchange(server, body(max_tokens=12))
    [wanted] = model.generate("And", temperature=0, max_new_tokens=12)
    assert status == 200 and answer["choices"][0]["text"] == wanted.text
    assert server.service.troubles == {}
    wait_until(lambda: not model.engine.num_unfinished)
    assert_idle(model.engine)


def body(**options: Any) -> dict[str, Any]:
    return {"prompt": "And", "max_tokens": 3, "temperature": 0, **options}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_by_its_name(server: RunningServer, name: str) -> None:
    for value in BAD[name]:
        error = refusal(server, body(**{name: value}))
        assert error["type"] == "invalid_request_error"
        assert error["param"] == name, error
        assert name in error["message"]
        assert_names_of_the_protocol(error)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"allowed_token_ids": [5], "suppress_tokens": [5]}, "allowed_token_ids"),
        ({"stream": True, "stream_options": {"usage": True}}, "usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": "no"}}, "stream_options"),
        ({"top_p": 0, "temperature": 2.01}, "temperature"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    server: RunningServer, options: dict[str, Any], param: str
) -> None:
    error = refusal(server, body(**options))
    assert error["param"] == param and param in error["message"]
    assert_names_of_the_protocol(error)


def test_an_unknown_field_is_named_with_the_nearest_known_one(server: RunningServer) -> None:
    for name, told in UNKNOWN.items():
        assert told in refusal(server, body(**{name: 1}))["message"]
    assert refusal(server, body(temprature=1))["param"] == "temprature"
    assert exchange(server, body(temprature=None))[0] == 200  # as if it had not been sent


def test_what_is_not_json_is_refused(server: RunningServer) -> None:
    for sent in NOT_JSON:
        for path in ("/v1/completions", *ELSEWHERE):
            refusal(server, sent, path)


@pytest.mark.parametrize("path", ELSEWHERE)
def test_the_other_paths_refuse_what_is_wrong(server: RunningServer, path: str) -> None:
    for sent in ELSEWHERE[path]:
        refusal(server, sent, path)


def test_the_other_paths_name_the_field_that_is_wrong(server: RunningServer) -> None:
    for path, param, sent in [
        ("/v1/score", "input", {"input": LONE}), ("/v1/score", "input", {"input": 5}),
        ("/v1/score", "prompt", {"prompt": LONE, "labels": ["a"]}),
        ("/v1/score", "labels", {"prompt": "a", "labels": [LONE]}),
        ("/v1/score", "timeout", {"input": "a", "timeout": 0}),
        ("/tokenize", "prompt", {"prompt": LONE}),
        ("/tokenize", "add_special_tokens", {"prompt": "a", "add_special_tokens": 1}),
        ("/detokenize", "tokens", {"tokens": [4096]}),
    ]:  # fmt: skip
        assert refusal(server, sent, path)["param"] == param


def test_another_model_is_not_found(server: RunningServer) -> None:
    bodies = {"/v1/completions": body(), "/v1/score": {"input": "a"}, "/tokenize": {"prompt": "a"},
              "/detokenize": {"tokens": []}}  # fmt: skip
    for path, sent in bodies.items():
        for name in ("another", "x" * 10_000, LONE, "../" * 9):
            error = refusal(server, {**sent, "model": name}, path, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_paths_and_methods_that_are_none_have_errors_of_the_same_form(
    server: RunningServer,
) -> None:
    for method, path, wanted in [
        ("GET", "/v1/completions", 405), ("DELETE", "/metrics", 405), ("GET", "/", 404),
        ("POST", "/v1/images", 404), ("GET", "/v1/models/x/../y", 404), ("PUT", "/%ff%00", 404),
        ("POST", "/v1/chat/completions", 404), ("POST", "/v1/embeddings", 404),
    ]:  # fmt: skip
        status, answer, headers = exchange(server, b"", path, method)
        assert status == wanted
        checked(answer)
        assert (status == 405) == ("allow" in headers)


Ask = Callable[..., openai.APIStatusError]


@pytest.fixture(params=["sync", "async"])
def failing(request: pytest.FixtureRequest) -> Ask:
    """What openai's client raises."""

    def ask(server: RunningServer, **options: Any) -> openai.APIStatusError:
        arguments = {"model": MODEL, "prompt": "And", "max_tokens": 3, **options}
        given = {"base_url": f"{server.url}/v1", "api_key": "key", "max_retries": 0}
        with pytest.raises(openai.APIStatusError) as caught:
            how[request.param](given, arguments)
        checked({"error": caught.value.body})
        return caught.value

    def ask_sync(given: Any, arguments: Any) -> None:
        with openai.OpenAI(**given) as client:
            client.completions.create(**arguments)

    async def ask_async(given: Any, arguments: Any) -> None:
        async with openai.AsyncOpenAI(**given) as client:
            await client.completions.create(**arguments)

    how = {"sync": ask_sync, "async": lambda *both: asyncio.run(ask_async(*both))}
    return ask


def test_openais_client_raises_what_it_does_at_openais(
    model: fastgen.Generator, server: RunningServer, failing: Ask
) -> None:
    error = failing(server, temperature=-1)
    assert type(error) is openai.BadRequestError and error.param == "temperature"
    error = failing(server, model="another")
    assert type(error) is openai.NotFoundError and error.code == "model_not_found"
    with serving({MODEL: model}, keys=Keys(["other"])) as locked:
        error = failing(locked)
        assert type(error) is openai.AuthenticationError and error.code == "invalid_api_key"
    with serving({MODEL: model}, limits=ServerLimits(body_bytes=500)) as small:
        error = failing(small, prompt="And " * 200)
        assert type(error) is openai.APIStatusError and error.status_code == 413
        small.service.begin_to_end()
        error = failing(small)
        assert type(error) is openai.InternalServerError and error.status_code == 503
        assert error.response.headers["retry-after"] == "1" and error.code == "unavailable"
        assert failing(small, stream=True).status_code == 503


def test_a_full_queue_says_when_to_come_again(model: fastgen.Generator, failing: Ask) -> None:
    with (
        serving({MODEL: model}, queue_config=QueueConfig(max_waiting=0)) as full,
        openai.OpenAI(base_url=f"{full.url}/v1", api_key="key", max_retries=0) as client,
    ):
        long: dict[str, Any] = {"n": 8, "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
        with client.completions.create(model=MODEL, prompt="A", stream=True, **long) as stream:
            next(iter(stream))
            for options in ({}, {"stream": True}, {"n": 8}, {"prompt": ["a", "b"]}):
                error = failing(full, **options)
                assert type(error) is openai.RateLimitError
                assert error.code == "queue_full" and error.type == "rate_limit_error"
                assert error.response.headers["retry-after"] == "1"
        wait_until(lambda: not model.engine.num_unfinished)
        assert client.completions.create(model=MODEL, prompt="A", n=8).usage is not None


def test_what_can_never_fit_is_no_reason_to_come_again(
    model: fastgen.Generator, server: RunningServer
) -> None:
    # The queue is empty, and yet they can never be had: with a 429 a client would try for ever.
    refusal(server, body(prompt=["a"] * 10, n=128))


def test_a_failure_tells_nothing_of_the_inside(
    model: fastgen.Generator, server: RunningServer, failing: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "/home/someone/secret.py of another's prompt"

    def broken(*args: Any, **options: Any) -> Any:
        raise OSError(secret)

    for owner, name in ((model.engine.decoder, "step"), (model.job_maker, "_jobs"),
                        (model.job_maker, "generation")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            error = failing(server)
            assert type(error) is openai.InternalServerError and error.status_code == 500
            assert "secret" not in error.response.text and "secret" not in str(error)
    with monkeypatch.context() as patch:
        patch.setattr(type(detokenizer_of(tokenizer_of(model).sink())), "push", broken)
        error = failing(server)
        assert error.status_code == 500 and "secret" not in error.response.text
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            stream = client.completions.create(model=MODEL, prompt="And", stream=True)
            with pytest.raises(openai.APIError, match="generation failed") as caught:
                list(stream)
        assert "secret" not in str(caught.value.body)


def test_scores_that_take_too_long_are_told_so(server: RunningServer) -> None:
    error = refusal(server, {"input": "word " * 9000, "timeout": 0.01}, "/v1/score", 408)
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")


def test_any_number_of_names_makes_no_more_metrics(server: RunningServer) -> None:
    for path in ("/v1/models/one", "/v1/models/three%2Ffour", "/v1/five", "/six"):
        assert exchange(server, b"", path, "GET")[0] == 404
    text = server.service.metrics.text().decode()
    assert not any(name in text for name in ('one"', "four", "five", "six"))


def test_a_body_that_does_not_come_is_not_waited_for(model: fastgen.Generator) -> None:
    with (
        serving({MODEL: model}, limits=ServerLimits(body_timeout=0.2)) as hasty,
        socket.create_connection(("127.0.0.1", hasty.port), timeout=WITHIN) as connection,
    ):
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        head, _, answer = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert checked(json.loads(answer))["type"] == "timeout_error"
