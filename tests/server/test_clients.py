"""Clients that do not write, do not read, or leave: what they hold of the server comes free."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

import fastgen
from fastgen.engine.requests import Request
from fastgen.server.limits import ServerLimits
from held_steps import held_for_a_cancel
from raw_client import (
    CANARY,
    LONG,
    answer,
    begun,
    canary,
    connected,
    everything,
    get,
    head,
    memory,
    post,
    text_of,
)
from server_harness import RunningServer
from tiny_checkpoints import cases
from waits import WITHIN, wait_until

SIZES = {"body_bytes": 100_000, "header_bytes": 8192}
HASTY = ServerLimits(**SIZES, header_timeout=1, keep_alive=2, body_timeout=1.5, send_timeout=2)


pytestmark = pytest.mark.usefixtures("unharmed")


@pytest.fixture(scope="module")
def limits() -> ServerLimits:
    return ServerLimits(**SIZES)


@pytest.fixture
def hasty_limits() -> ServerLimits:
    return HASTY


def test_slow_bodies_are_cut_off(hasty: RunningServer) -> None:
    for line in ("content-length: 50", "transfer-encoding: chunked"):
        reply = answer(hasty.port, head("POST", "/v1/completions", line))
        assert (reply.status, reply.message) == (408, "the body took over 1.5 seconds")


DRIPPING = {
    "nothing": b"",
    "headers": b"GET /health/live HTTP/1.1\r\nhost: x\r\n",
    "a body": head("POST", "/v1/completions", "content-length: 9999"),
    "a body that nobody reads": head("GET", "/health/live", "content-length: 9999"),
    "a body of no path": head("POST", "/nothing", "content-length: 9999"),
    "a second request": get("/health/live").replace(b"close", b"keep-alive"),
}


def test_clients_that_write_a_byte_now_and_then_are_cut_off(hasty: RunningServer) -> None:
    """Behind this, whatever it is."""

    def drip(start: bytes) -> bool:
        end = time.monotonic() + WITHIN
        try:
            with connected(hasty.port) as client:
                client.sendall(start)
                while time.monotonic() < end:
                    time.sleep(0.1)
                    client.sendall(b"a")
        except ConnectionError:
            return True
        return False

    with ThreadPoolExecutor(len(DRIPPING)) as pool:
        is_cut = dict(zip(DRIPPING, pool.map(drip, DRIPPING.values()), strict=True))
    assert all(is_cut.values()), is_cut


def test_a_silent_client_is_cut_off_without_a_word(hasty: RunningServer) -> None:
    began = time.monotonic()
    with connected(hasty.port) as client:
        assert everything(client) == b""
    assert time.monotonic() - began > HASTY.header_timeout * 0.9, "it was not given its time"


def test_a_client_that_reads_nothing_of_a_large_stream(
    server: RunningServer, hasty: RunningServer, model: fastgen.Generator
) -> None:
    """Its rows are cancelled and it is cut, or told so; a stream beside it is not held up.

    Which of the two depends on what the system's buffers hold and on when it begins to read.
    What 64 rows of 900 tokens have come to by then is 1 KB a token, and is freed.
    """
    engine = model.engine
    before = memory()
    wanted = model.generate("Blessed are", max_new_tokens=300, temperature=0, ignore_eos=True)
    beside = {**LONG, "prompt": "Blessed are", "max_tokens": 300, "stream": True}
    with closing(begun(server.port, post(beside))) as reader:
        wait_until(lambda: engine.num_unfinished == 1)
        greedy = {**LONG, "stream": True, "n": 64, "logprobs": 5}
        with closing(begun(hasty.port, post(greedy), receive_buffer=2048)) as client:
            wait_until(lambda: engine.num_unfinished > 50)
            text = text_of(everything(reader))
            assert text == wanted[0].completions[0].text
            wait_until(lambda: engine.num_unfinished == 0)
            got = everything(client)
            assert b"[DONE]" not in got or b'"code":"unread"' in got
    assert memory() - before < 100 << 20


def test_a_client_that_asks_for_ever_and_reads_nothing(hasty: RunningServer) -> None:
    before = memory()
    ask = head("GET", "/openapi.json") * 100
    with closing(begun(hasty.port, b"", receive_buffer=2048)) as client:
        is_cut = False
        while not is_cut:
            try:
                client.sendall(ask)
            except ConnectionError:
                is_cut = True
    assert memory() - before < 64 << 20


def test_a_client_that_leaves_the_end_of_a_response_unread(hasty: RunningServer) -> None:
    """However little that is: its connection does not stay open for ever."""
    with closing(begun(hasty.port, b"", receive_buffer=2048)) as client:
        wait_until(lambda: len(hasty.server.server_state.connections) == 1)
        [connection] = hasty.server.server_state.connections
        own = connection.transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        client.sendall(head("GET", "/openapi.json"))
        wait_until(lambda: connection.transport.get_write_buffer_size() > 0)
        assert connection.transport.get_write_buffer_size() < 64 << 10
        wait_until(lambda: not hasty.server.server_state.connections)


def leave(client: socket.socket) -> None:
    client.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def requests_of(model: fastgen.Generator, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Those that come from now on."""
    requests, add = list[Request](), model.engine.add_request

    def add_request(*args: Any, **options: Any) -> Request:
        requests.append(add(*args, **options))
        return requests[-1]

    monkeypatch.setattr(model.engine, "add_request", add_request)
    return requests


def reasons_of(requests: Sequence[Request]) -> set[str | None]:
    """Why their rows have ended."""
    return {row.finish_reason for request in requests for row in request.rows}


LEAVERS = {
    "one": post(LONG),
    "many": post({**LONG, "n": 64}),
    "stream": post({**LONG, "stream": True}),
    "many streams": post({**LONG, "prompt": ["a", "b", "c"], "stream": True, "n": 8}),
    "score": post({"input": [f"{n} in the beginning" * 95 for n in range(50)]}, path="/v1/score"),
    "with the next request sent": post(LONG, close=False) + get("/health/live"),
}


@pytest.mark.parametrize("sent", cases(LEAVERS))
@pytest.mark.parametrize("go", [leave, reset])
def test_a_client_that_leaves_takes_its_rows_along(
    server: RunningServer,
    model: fastgen.Generator,
    sent: bytes,
    go: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, requests = model.engine, requests_of(model, monkeypatch)
    with held_for_a_cancel(model):
        with closing(begun(server.port, sent)) as client:
            wait_until(lambda: engine.num_unfinished > engine.num_waiting)
            go(client)
        wait_until(lambda: engine.num_unfinished == 0)
    assert "cancelled" in reasons_of(requests), "it came to its end"
    assert engine.num_free_blocks == engine.decoder.limits.num_blocks


def test_a_client_that_leaves_after_its_next_request(
    server: RunningServer, model: fastgen.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes behind a request that is under way does not hide that its client has gone."""
    requests = requests_of(model, monkeypatch)
    with held_for_a_cancel(model):
        with closing(begun(server.port, post({**LONG, "n": 8}, close=False))) as client:
            wait_until(lambda: model.engine.num_unfinished > 0)
            client.sendall(get("/health/live"))
        wait_until(lambda: model.engine.num_unfinished == 0)
    assert "cancelled" in reasons_of(requests), "it came to its end"


def test_many_connections_that_come_and_go(server: RunningServer, canary_text: str) -> None:
    rng = random.Random(3)
    for _ in range(300):
        with connected(server.port) as client:
            client.sendall(post(CANARY)[: rng.randrange(400)])
            rng.choice([leave, reset])(client)
    assert canary(server.port) == canary_text
