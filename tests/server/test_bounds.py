"""What one client may cost the others: answers and scores are bounded before anything is made, slow
readers are told from silent ones, and what ends is counted and forgotten.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

import fastgen
from engine_harness import greedy, make_engine, num_deadlines, random_prompt, run_all
from fastgen.server import bodies, endpoints
from fastgen.server.app import make_app
from fastgen.server.completions import completion_request
from fastgen.server.limits import ServerLimits
from fastgen.server.service import Keys, Service
from held_steps import held_for_a_cancel
from json_client import refusal
from raw_client import LONG, answer, begun, everything, get, memory, post, replies
from server_harness import MODEL, RunningServer, ServerProcess, serving
from server_load import metrics
from waits import WITHIN, wait_in_loop_until, wait_until

PART = 1 << 16  # bytes that a slow reader takes at a time


def refused(server: RunningServer, body: Any, path: str = "/v1/completions") -> str:
    message: str = refusal(server, body, path)["message"]
    return message


MANY = [str(token_id) for token_id in range(19_000)]
LARGE: dict[str, Any] = {
    "stop": [str(token_id) for token_id in range(200_000)], "bad_words": ["x" * 4_000_000],
    "suppress_tokens": list(range(290_000)), "logit_bias": dict.fromkeys(MANY, 1),
    "sequence_bias": dict.fromkeys(MANY, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_options_of_any_size_keep_nobody_waiting(
    server: RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read and checked on other threads: here not before another request is answered."""
    threads, is_answered = list[int](), threading.Event()

    def held(original: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any) -> Any:
            threads.append(threading.get_ident())
            assert threads[-1] == server.thread_id or is_answered.wait(WITHIN)
            return original(*args)

        return work

    monkeypatch.setattr(bodies, "parsed", held(bodies.parsed))
    monkeypatch.setattr(endpoints, "completion_request", held(completion_request))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(refused, server, {"prompt": "And", name: LARGE[name]})
        wait_until(lambda: threads)
        assert answer(server.port, get("/health/live")).status == 200
        is_answered.set()
        asked.result(WITHIN)
    assert len(threads) == 2 and server.thread_id not in threads


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([*range(301_000)], "the body holds more than 300000 values"),
        ({"a": [{str(n): n for n in range(60)}] * 400}, "the body holds more than 20000 names"),
    ],
)
def test_what_json_would_take_long_for_is_refused_before(
    server: RunningServer, value: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it works no other thread runs."""
    sent = json.dumps({"prompt": "a", "x": value}).encode()
    monkeypatch.setattr(bodies, "json", None)
    assert refused(server, sent) == told


def test_labels_behind_a_long_prompt_are_refused_before_they_are_joined(
    server: RunningServer,
) -> None:
    body = {"prompt": "word " * 60_000, "labels": [f" {at}" for at in range(128)]}
    refused(server, body, "/v1/score")
    before = memory()
    assert "exceed the limit of 65536" in refused(server, body, "/v1/score")
    assert memory() - before < 60e6


def test_labels_need_something_to_be_scored(
    model: fastgen.Generator, server: RunningServer
) -> None:
    assert "empty text" in refused(server, {"prompt": "a", "labels": ["b", ""]}, "/v1/score")
    reply = answer(server.port, post({"prompt": "", "labels": [" the", "ly"]}, path="/v1/score"))
    [eos, *_] = model.config.eos_token_ids
    for item in reply.json["data"]:
        [score] = model.score([[eos, *item["token_ids"]]])
        assert item["logprobs"] == list(score.logprobs[1:])


def test_an_answer_holds_a_bounded_number_of_logprobs(server: RunningServer) -> None:
    body = {"prompt": ["word " * 490] * 64, "n": 8, "echo": True, "logprobs": 5, "max_tokens": 1}
    assert refused(server, body).startswith("logprobs: ")
    body |= {"n": 1, "logprobs": 1, "prompt": ["word " * 100] * 64}
    assert answer(server.port, post(body)).status == 200


def test_salts_are_short(server: RunningServer) -> None:
    assert answer(server.port, post({"prompt": "a", "cache_salt": "x" * 256})).status == 200
    assert "cache_salt" in refused(server, {"prompt": "a", "cache_salt": "x" * 257})


def test_a_slow_reader_gets_all_of_it_and_a_silent_one_is_cut_off(
    model: fastgen.Generator,
) -> None:
    body = {"prompt": [[11] * 1000] * 16, "echo": True, "logprobs": 5, "max_tokens": 0, "seed": 1}
    limits = ServerLimits(send_timeout=2.0)
    with serving({MODEL: model}, limits=limits) as server:
        whole = len(replies_to(server, body, pause=0.0))
        pause = 1.5 * limits.send_timeout / (whole / PART)  # reading is to take longer than that
        assert pause < 0.2 and len(replies_to(server, body, pause)) == whole
        with closing(begun(server.port, post(body), receive_buffer=4096)) as silent:
            wait_until(lambda: bool(server.server.server_state.connections))
            wait_until(lambda: not server.server.server_state.connections)
            assert len(everything(silent)) < whole


def replies_to(server: RunningServer, body: Any, pause: float) -> bytes:
    """Read with pauses."""
    parts = []
    with closing(begun(server.port, post(body), receive_buffer=PART)) as client:
        while part := client.recv(PART):
            parts.append(part)
            time.sleep(pause)
    [reply] = replies(b"".join(parts))
    return reply.body


def test_what_is_cancelled_is_counted(model: fastgen.Generator, server: RunningServer) -> None:
    before = metrics(server)
    for stream in (False, True):
        with held_for_a_cancel(model):
            with closing(begun(server.port, post({**LONG, "stream": stream}))):
                wait_until(lambda: model.engine.num_unfinished == 1)
                wait_until(lambda: model.engine.stats.decode_tokens > 0)
            wait_until(lambda: not model.engine.num_unfinished)
    after = metrics(server)
    name = ("fastgen_completions_total", "cancelled")
    assert after[name] - before[name] == 2
    tokens = ("fastgen_tokens_total", "prompt")
    assert after[tokens] > before[tokens]


def test_health_is_open_where_the_app_is_mounted(model: fastgen.Generator) -> None:
    service = Service({MODEL: model}, keys=Keys(["k1"]))
    app = Starlette(routes=[Mount("/llm", make_app(service))])

    async def status(path: str) -> int:
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(),
                 "root_path": "", "query_string": b"", "headers": []}  # fmt: skip
        found: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        await app(scope, Request(scope).receive, send)
        return found[0]

    async def all_of() -> list[int]:
        paths = ("/llm/health", "/llm/health/live", "/llm/health/ready", "/llm/v1/models")
        found = [await status(path) for path in paths]
        await service.close()
        return found

    assert asyncio.run(all_of()) == [200, 200, 200, 401]


def test_a_unix_socket_is_its_successors_while_the_first_drains(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with ServerProcess("--uds", path, "--drain-timeout", "600") as first:
        first.wait_until_ready()
        with closing(begun(path, post({**LONG, "stream": True, "n": 4}))) as client:
            client.recv(1)
            first.terminate()
            wait_until(lambda: not Path(path).exists())
            with ServerProcess("--uds", path) as second:
                second.wait_until_ready()
                everything(client)
                assert first.wait() == 0
                assert answer(path, get("/health/ready")).status == 200
                second.terminate()
                assert second.wait() == 0


def test_whoever_waits_for_several_futures_is_told_of_a_cancelled_one(
    model: fastgen.Generator,
) -> None:
    with fastgen.ThreadedEngine(model) as engine:
        futures = [engine.submit("In the", max_new_tokens=500, ignore_eos=True) for _ in range(2)]
        assert futures[0].cancel()
        done, _ = concurrent.futures.wait(futures[:1], timeout=WITHIN)
        assert done == {futures[0]}
        futures[1].cancel()
        assert set(concurrent.futures.as_completed(futures, timeout=WITHIN)) == set(futures)


def test_a_stream_that_is_opened_twice_or_closed_while_it_opens_leaves_nothing(
    model: fastgen.Generator,
) -> None:
    text = "In the beginning " * 150  # long enough to be encoded elsewhere

    async def twice(engine: fastgen.AsyncEngine) -> None:
        stream = engine.stream(text, max_new_tokens=400, ignore_eos=True)
        await asyncio.gather(stream.open(), stream.open())
        assert model.engine.num_unfinished == 1
        await stream.aclose()

    async def closed(engine: fastgen.AsyncEngine) -> None:
        stream = engine.stream(text, max_new_tokens=400, ignore_eos=True)
        opening = asyncio.ensure_future(stream.open())
        await asyncio.sleep(0)
        await stream.aclose()
        await opening
        assert [piece async for piece in stream] == []

    async def main() -> None:
        async with fastgen.AsyncEngine(model) as engine:
            for story in (twice, closed):
                await story(engine)
                await wait_in_loop_until(lambda: not model.engine.num_unfinished)

    asyncio.run(main())


def test_deadlines_of_what_has_ended_are_forgotten() -> None:
    engine, rng = make_engine(), np.random.default_rng(0)
    late = time.monotonic() + 1000
    old = engine.add_request(
        random_prompt(rng, 9), greedy(max_new_tokens=200, ignore_eos=True), deadline=late
    )
    for _ in range(40):
        run_all(engine, [
            engine.add_request(random_prompt(rng, 5), greedy(max_new_tokens=1), deadline=late + 1)
            for _ in range(4)
        ])  # fmt: skip
    assert not old.done
    assert num_deadlines(engine) <= 2 * 64
    engine.cancel(old)


def test_the_schema_says_what_every_field_may_be(server: RunningServer) -> None:
    document = json.loads(answer(server.port, get("/openapi.json")).body)
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None:
            fields = body["content"]["application/json"]["schema"]["properties"]
            assert all(fields.values()), path
