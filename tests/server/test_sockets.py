"""What strangers may send to a server: anything. It stays up, exact for others, and small."""

from __future__ import annotations

import gzip
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

import fastgen
from fastgen.server.limits import ServerLimits
from fastgen.server.service import Keys
from raw_client import (
    CANARY,
    answer,
    canary,
    chunked,
    connected,
    everything,
    exchange,
    get,
    head,
    memory,
    post,
    replies,
)
from server_harness import MODEL, RunningServer, serving
from tiny_checkpoints import cases

LIMITS = ServerLimits(body_bytes=100_000, header_bytes=8192)


pytestmark = pytest.mark.usefixtures("unharmed")


@pytest.fixture(scope="module")
def limits() -> ServerLimits:
    return LIMITS


BAD_BYTES = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": bytes(9000),
    "no version": b"GET /health/live\r\nhost: x\r\n\r\n",
    "another protocol": b"EHLO x\r\n\r\n",
    "no host": b"GET /health/live HTTP/1.1\r\n\r\n",
    "control in method": b"G\x01ET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "control in path": b"GET /\x7f\x01 HTTP/1.1\r\nhost: x\r\n\r\n",
    "control in header": b"GET / HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n",
    "space in header name": b"GET / HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nhost: x\r\nabc\r\n\r\n",
    "two lengths": head("POST", "/", "content-length: 1", "content-length: 2") + b"ab",
    "negative length": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    "length in words": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: two\r\n\r\n",
    "endless length": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 40 + b"\r\n\r\n",
    "unknown encoding": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    "no chunk": head("POST", "/v1/completions", "transfer-encoding: chunked") + b"xyz\r\n",
    "too long a chunk size": head("POST", "/v1/completions", "transfer-encoding: chunked")
    + b"f" * 30 + b"\r\n",
    "chunk longer than it says": head("POST", "/v1/completions", "transfer-encoding: chunked")
    + b"1\r\nabc\r\n",
}  # fmt: skip


@pytest.mark.parametrize("sent", cases(BAD_BYTES))
def test_what_is_no_http_is_told_so(server: RunningServer, sent: bytes) -> None:
    *_, reply = replies(exchange(server.port, sent))
    assert (reply.status, reply.message) in (
        (400, "this is not a valid HTTP request"),
        (431, "the headers exceed 8192 bytes"),
    )
    assert reply.headers["connection"] == "close"


TOO_LONG = {
    "one header": [get("/health/live", "a: " + "b" * 10_000)],
    "one long header": [get("/health/live", "a: " + "b" * 3_000_000)],
    "many headers": [get("/health/live", *["a: b"] * 2000)],
    "very many headers": [get("/health/live", *["a: b"] * 200_000)],
    "in pieces": [get("/health/live")[:-2], *[b"a: b\r\n" * 150] * 15],
    "path": [get("/" + "a" * 10_000)],
    "query": [get("/health/live?" + "a" * 10_000)],
    "before a body": [post(CANARY, "a: " + "b" * 10_000)],
}  # fmt: skip


@pytest.mark.parametrize("parts", cases({name: (parts,) for name, parts in TOO_LONG.items()}))
def test_headers_are_bounded(server: RunningServer, parts: list[bytes]) -> None:
    with connected(server.port) as client:
        for part in parts:
            client.sendall(part)  # it is not cut off before it can see why
        [reply] = replies(everything(client))
    assert (reply.status, reply.message) == (431, "the headers exceed 8192 bytes")


def test_headers_within_the_bound_are_taken(server: RunningServer) -> None:
    assert answer(server.port, get("/health/live", "a: " + "b" * 7900)).status == 200


def nested(depth: int) -> bytes:
    return b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"


BAD_BODIES = {
    "nothing": (b"", "not valid JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a number": (b"1", "must be a JSON object"),
    "cut off": (b'{"prompt": "a', "not valid JSON (line 1, column 12)"),
    "two": (b"{}{}", "not valid JSON"),
    "single quotes": (b"{'prompt': 'a'}", "not valid JSON"),
    "latin-1": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    "zero bytes": (bytes(1000), "not valid JSON"),
    "control in a string": (b'{"prompt": "a\x01"}', "not valid JSON"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "NaN, which is not JSON"),
    "Infinity": (b'{"prompt": "a", "top_p": -Infinity}', "-Infinity, which is not JSON"),
    "too large a number": (b'{"prompt": "a", "temperature": 1e999}', "must be finite"),
    "a number of many digits": (b'{"seed": ' + b"1" * 90_000 + b"}", "not valid JSON"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "same key twice"),
    "an inner key twice": (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "same key twice"),
    "nested": (nested(40), "deeper than 32"),
    "nested very deep": (nested(49_000), "deeper than 32"),
    "never closed": (b'{"a":' * 19_000, "deeper than 32"),
    "closed too often": (b"{}" + b"]" * 90_000, "not valid JSON"),
    "a surrogate in the prompt": (rb'{"prompt": "\ud800"}', "lone surrogate"),
    "a surrogate in a key": (rb'{"prompt": "a", "\udfff": 1}', "unknown option"),
    "gzip": (gzip.compress(json.dumps(CANARY).encode()), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "told"), cases(BAD_BODIES))
def test_bad_bodies_are_told_what_is_wrong(server: RunningServer, body: bytes, told: str) -> None:
    lines = ["content-encoding: gzip"] if body.startswith(b"\x1f\x8b") else []
    reply = answer(server.port, post(body, *lines))
    assert reply.status == 400
    assert told in reply.message


def test_brackets_within_a_text_are_not_depth(server: RunningServer) -> None:
    text = '[{"' * 200 + "\\" * 7
    assert answer(server.port, post({"prompt": text, "max_tokens": 1})).status == 200


def test_one_byte_at_a_time(server: RunningServer, canary_text: str) -> None:
    for parts in (chunked(json.dumps(CANARY).encode(), 1), [bytes([b]) for b in post(CANARY)]):
        reply = answer(server.port, *parts)
        assert reply.json["choices"][0]["text"] == canary_text


LARGE = b'{"prompt": "' + b"a" * 150_000 + b'"}'
HUGE = b'{"prompt": "' + b"a" * 30_000_000 + b'"}'


@pytest.mark.parametrize(
    "parts",
    cases({
        "declared": ([post(LARGE)],),
        "declared, and not sent": ([head("POST", "/v1/score", "content-length: 99999999999")],),
        "chunked": (chunked(LARGE, 10_000),),
        "one chunk": (chunked(LARGE, len(LARGE)),),
        "declared less": (chunked(LARGE, 10_000, "content-length: 5"),),
        "expected": ([head("POST", "/tokenize", "expect: 100-continue",
                           "content-length: 200000")],),
    }),
)  # fmt: skip
def test_bodies_are_bounded(server: RunningServer, parts: list[bytes]) -> None:
    *_, reply = replies(exchange(server.port, *parts))
    assert (reply.status, reply.message) == (413, "the body is larger than 100000 bytes")


def test_huge_bodies_take_no_memory(server: RunningServer) -> None:
    """Whoever sends far too much may meet a reset before the answer; the process does not grow."""
    sent = ([post(HUGE)], chunked(HUGE, 1_000_000))
    before = memory()
    for parts in sent * 3:
        raw = exchange(server.port, *parts)
        assert not raw or replies(raw)[0].status == 413
    assert memory() - before < 30 << 20


def assert_answers(client: socket.socket, canary_text: str) -> None:
    client.sendall(post(CANARY, close=False))
    raw = client.recv(65536)
    while not raw.endswith(b"}"):
        raw += client.recv(65536)
    [reply] = replies(raw)
    assert reply.json["choices"][0]["text"] == canary_text


def test_a_connection_is_used_again(server: RunningServer, canary_text: str) -> None:
    with connected(server.port) as client:
        for _ in range(3):
            assert_answers(client, canary_text)


def test_a_connection_does_not_stay_for_ever(model: fastgen.Generator, canary_text: str) -> None:
    with serving({MODEL: model}, limits=ServerLimits(keep_alive=2)) as hasty:
        began = time.monotonic()
        with connected(hasty.port) as client:
            assert_answers(client, canary_text)
            assert everything(client) == b""
        assert time.monotonic() - began > 1.9, "it was not kept for its time"


def test_requests_may_follow_each_other_at_once(server: RunningServer, canary_text: str) -> None:
    """Also behind a body that nobody reads, and behind a stream; answers come in their order."""
    sent = [
        post(CANARY, close=False), head("GET", "/health/live", "content-length: 3") + b"abc",
        post({**CANARY, "stream": True}, close=False), post(b"{", close=False), post(CANARY),
    ]  # fmt: skip
    for parts in ([b"".join(sent)], sent):
        found = replies(exchange(server.port, *parts))
        assert [reply.status for reply in found] == [200, 200, 200, 400, 200]
        assert found[0].json["choices"][0]["text"] == canary_text
        assert found[4].json["choices"][0]["text"] == canary_text
        assert b"data: [DONE]" in found[2].body


def test_methods(server: RunningServer) -> None:
    found = answer(server.port, head("HEAD", "/health/live", "connection: close"), to_head=True)
    assert (found.status, found.body) == (200, b"")
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "BREW"):
        sent = head(method, "/v1/completions", "connection: close")
        found = answer(server.port, sent, to_head=method == "HEAD")
        assert found.status == 405
        assert found.headers["allow"] == "POST"
        if method != "HEAD":
            assert found.message == f"{method} /v1/completions: Method Not Allowed"


PATHS = ("/", "/v1", "/v1/completions/", "//v1/completions", "/v1//completions", "/V1/COMPLETIONS",
         "/v1/completions/../models", "/v1/%2e%2e/metrics", "/../../etc/passwd", "/%00", "/%ff%fe",
         "http://x/health/live", "*", "/health/live/", "/health/live;a",
         "/health/live/../../metrics", "/.git/config", "/docs", "/%E2%80%A8", "/v1/models%3f",
         "/health/live%0d%0aa:b"         )  # fmt: skip


def test_path_tricks_lead_nowhere(server: RunningServer) -> None:
    for path in PATHS:
        reply = answer(server.port, head("GET", path, "connection: close"))
        assert reply.status == (405 if path == "/v1/completions" else 404), path
        assert "no such path" in reply.message
        assert not {"location", "a"} & set(reply.headers)


def test_path_tricks_open_no_locked_door(server: RunningServer, model: fastgen.Generator) -> None:
    locked = ("/v1/models", "/metrics", "/openapi.json", "/healthy", "/health/live/x")
    with serving({MODEL: model}, keys=Keys(["key"])) as other:
        for path in (*PATHS, *locked, "/v1/models?/health/live"):
            for line in ("a: b", "authorization: Bearer no", "authorization: Basic key",
                         "authorization: key", "authorization: Bearer"):  # fmt: skip
                reply = answer(other.port, get(path, line))
                assert reply.status == 401, path
                assert reply.headers["www-authenticate"] == "Bearer"
                assert "key" not in reply.headers.values() and reply.message
        app: Any = other.server.config.app
        routes = {route.path for route in app.routes}
        assert len(routes) > 10
        shut = {path for path in routes if answer(other.port, get(path)).status == 401}
        assert routes - shut == {"/health", "/health/live", "/health/ready"}
        for path in ("/health/live", "/%68ealth/live", "/health/ready?x"):
            assert answer(other.port, get(path)).status == 200
        assert answer(other.port, get("/v1/models", "authorization: bearer key")).status == 200


def test_paths_of_a_pattern_do_not_fill_the_metrics(server: RunningServer) -> None:
    for at in range(50):
        answer(server.port, get(f"/v1/models/no-such-model-{at}"))
    shown = answer(server.port, get("/metrics")).body
    assert b"no-such-model" not in shown


@pytest.fixture
def hasty_limits() -> ServerLimits:
    return replace(LIMITS, header_timeout=3, keep_alive=3, body_timeout=3)


def test_random_mutations_of_valid_requests(
    server: RunningServer, hasty: RunningServer, canary_text: str
) -> None:
    """Each gets nothing, or whole answers; meanwhile others' results are exact."""
    rng = random.Random(7)
    valid = [
        post(CANARY),
        post({**CANARY, "stream": True, "n": 2, "logprobs": 1, "echo": True}),
        post({"input": ["a", "b"]}, path="/v1/score"),
        post({"prompt": "é ᚠ"}, path="/tokenize"),
        get("/v1/models/bundled", "accept: */*"),
        b"".join(chunked(json.dumps(CANARY).encode(), 7)),
    ]
    sent = [mutated(rng.choice(valid), rng) for _ in range(250)]
    before = memory()
    with ThreadPoolExecutor(48) as pool:
        answers = [pool.submit(exchange, hasty.port, *cut(data, rng)) for data in sent]
        while not all(done.done() for done in answers):
            assert canary(server.port) == canary_text  # by the same engine
        for data, done in zip(sent, answers, strict=True):
            raw = done.result()
            statuses = [reply.status for reply in replies(raw, to_head=data.startswith(b"HEAD "))]
            assert set(statuses) <= {100, 200, 400, 404, 405, 408, 413, 431}, (data, raw)
            for reply in replies(raw):
                assert reply.status < 400 or reply.message
    # Blocks of the KV cache are the system's until they are used for the first time: 0.4 MB for
    # each of the 250 requests, and for those whose results are compared meanwhile.
    assert memory() - before < 192 << 20


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        junk = rng.choice([rng.randbytes(rng.randint(1, 9)), b"\r\n", b"\0", b'"', b"{[", b"-1e9"])
        data = rng.choice([
            data[:at] + junk + data[at:],
            data[:at] + junk + data[at + len(junk):],
            data[:at] + data[end:],
            data[:end] + data[at:],
            data[:at] + data[at:end].swapcase() + data[end:],
            data[:end],
        ])  # fmt: skip
    return data


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 4)))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
