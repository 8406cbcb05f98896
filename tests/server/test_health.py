"""What a server says of itself when steps hang or fail, and what models and keys share."""

from __future__ import annotations

import hmac
import itertools
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest

import fastgen
from engine_harness import assert_idle
from engine_threads import Clock, num_waiting
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.frontends.fair_lock import FairLock
from fastgen.server.limits import ServerLimits
from fastgen.server.service import Keys
from held_steps import stepping
from raw_client import (
    CANARY,
    LONG,
    Reply,
    answer,
    begun,
    canary,
    canary_of,
    everything,
    get,
    post,
    replies,
    text_of,
)
from server_harness import MODEL, RunningServer, serving
from waits import WITHIN, wait_until

TERMS = QueueConfig(stall_timeout=0.3)
SHORT = {"prompt": "And", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
BEGINNING = "In the beginning God created the heaven and the earth. " * 12


@pytest.fixture(scope="module")
def other() -> Iterator[fastgen.Generator]:
    with fastgen.load(max_batch_size=8) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def left_idle(model: fastgen.Generator, other: fastgen.Generator) -> Iterator[None]:
    yield
    for each in (model, other):
        wait_until(lambda: not (model.engine.num_unfinished or other.engine.num_unfinished))
        assert_idle(each.engine)


def fail() -> None:
    raise RuntimeError("inside, at /secret/path.py")


def health(server: RunningServer) -> tuple[int, int]:
    """Of its life, and of its readiness."""
    live, ready = (answer(server.port, get(f"/health/{kind}")) for kind in ("live", "ready"))
    return live.status, ready.status


def troubles(server: RunningServer) -> dict[str, str]:
    found: dict[str, str] = answer(server.port, get("/health/ready")).json["troubles"]
    return found


def test_a_hanging_step_is_seen_in_time_and_forgotten_when_it_ends(
    model: fastgen.Generator,
) -> None:
    """All the while the server answers; the request that waited ends as if nothing had been."""
    wanted = canary_of(model)
    hangs = threading.Event()
    with serving({MODEL: model}, queue_config=TERMS) as server, ThreadPoolExecutor(1) as pool:
        assert health(server) == (200, 200)
        with stepping(model, hangs.wait):
            waiting = pool.submit(canary, server.port)
            wait_until(lambda: model.engine.num_unfinished == 1)
            wait_until(lambda: health(server) == (200, 503))
            assert troubles(server) == {MODEL: "makes no progress"}
            assert b"fastgen_ready 0.0" in answer(server.port, get("/metrics")).body
            assert answer(server.port, post({"prompt": "a"}, path="/tokenize")).status == 200
            with closing(begun(server.port, post(LONG))):
                wait_until(lambda: model.engine.num_unfinished == 2)
            hangs.set()
            assert waiting.result(WITHIN) == wanted
        wait_until(lambda: health(server) == (200, 200))
        wait_until(lambda: b"fastgen_ready 1.0" in answer(server.port, get("/metrics")).body)
        assert canary(server.port) == wanted


def test_an_idle_server_stays_ready(model: fastgen.Generator, clock: Clock) -> None:
    with serving({MODEL: model}, queue_config=QueueConfig(stall_timeout=10)) as server:
        canary(server.port)
        clock.now += 11
        assert health(server) == (200, 200)


def test_a_step_that_fails_now_and_then_is_no_trouble(model: fastgen.Generator) -> None:
    wanted = canary_of(model)
    with serving({MODEL: model}, queue_config=TERMS) as server:
        for _ in range(3):
            for _ in range(2):
                with stepping(model, fail):
                    assert_step_failed(answer(server.port, post(SHORT)))
            assert canary(server.port) == wanted
        assert health(server) == (200, 200)


def assert_step_failed(reply: Reply) -> None:
    assert reply.status == 500
    assert reply.message.startswith("generation failed")
    assert "secret" not in reply.message and "inside" not in reply.message


def test_steps_that_always_fail_end_the_servers_life(
    model: fastgen.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """For good, so that whoever watches it starts another; its log has the cause."""
    with serving({MODEL: model}, queue_config=TERMS) as server:
        with stepping(model, fail):
            for _ in range(3):
                assert answer(server.port, post(SHORT)).status in (500, 503)
        wait_until(lambda: health(server) == (503, 503))
        assert troubles(server) == {MODEL: "cannot go on"}
        refused = answer(server.port, post(SHORT))
        assert (refused.status, refused.message) == (503, "this engine cannot go on")
        assert refused.headers["retry-after"] == "1"
        assert health(server) == (503, 503)
    [critical] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "/secret/path.py" in critical.getMessage()


def test_streams_under_way_are_told_that_a_step_failed(model: fastgen.Generator) -> None:
    steps, fails = itertools.count(), threading.Event()

    def fail_later() -> None:
        if next(steps) > 9:  # it does not get further before its client has read something
            assert fails.wait(WITHIN)
            fail()

    with serving({MODEL: model}) as server:
        with (
            stepping(model, fail_later),
            closing(begun(server.port, post({**LONG, "stream": True}))) as client,
        ):
            raw = client.recv(65536)
            fails.set()
            raw += everything(client)
        *_, error, done = replies(raw)[0].body.decode().split("data: ")
        assert '{"error":{"message":"generation failed' in error and done.startswith("[DONE]")
        assert '"code":"step_failed"' in error, "as a whole answer would say"
        assert raw.count(b'"error"') == 1 and b"secret" not in raw


def test_a_server_that_drains_is_alive_and_not_ready(model: fastgen.Generator) -> None:
    opened = threading.Event()
    with (
        stepping(model, opened.wait),
        serving({MODEL: model}) as server,
        closing(begun(server.port, post(SHORT))) as client,
    ):
        wait_until(lambda: model.engine.num_unfinished == 1)
        server.service.begin_to_end()
        assert health(server) == (200, 503)
        assert troubles(server) == {MODEL: "is shutting down"}
        refused = answer(server.port, post(SHORT))
        assert (refused.status, refused.message) == (503, "this engine is shutting down")
        opened.set()
        assert replies(everything(client))[0].status == 200


def test_a_drain_does_not_wait_longer_than_it_may(model: fastgen.Generator) -> None:
    """Who waits for a response is told that it will not come."""
    limits = ServerLimits(drain_timeout=0.3)
    with ThreadPoolExecutor(2) as pool:
        with serving({MODEL: model}, limits=limits) as server:
            waiting = [pool.submit(answer, server.port, post({**LONG, "n": 64})) for _ in range(2)]
            wait_until(lambda: model.engine.num_unfinished == 128)
        for each in waiting:
            reply = each.result(WITHIN)
            assert reply.status == 503 and reply.message.startswith("cancelled")


def lock_of(server: RunningServer) -> FairLock:
    """That its models share."""
    lock = server.service.models["a"].engine.thread.queue_config.fair_lock
    assert lock is not None
    return lock


def test_two_models_take_turns(model: fastgen.Generator, other: fastgen.Generator) -> None:
    """A short request is not kept waiting by a long one of another model; both are exact."""
    wanted, steps = canary_of(model), list[str]()
    is_asked, is_over = threading.Event(), threading.Event()

    def step_of_a() -> None:  # the long one gets on only beside a short one
        assert is_asked.wait(WITHIN)
        steps.append("a")
        wait_until(lambda: num_waiting(lock) or not is_asked.is_set() or is_over.is_set())

    def step_of_b() -> None:  # each lets the other ask for its turn, however slow its thread is
        steps.append("b")
        wait_until(lambda: num_waiting(lock))

    with (
        serving({"a": model, "b": other}) as server,
        stepping(model, step_of_a),
        stepping(other, step_of_b),
    ):
        lock = lock_of(server)
        # each step gives a token: else there is nothing to take turns with
        long = {**LONG, "n": 8, "model": "a", "stream": True, "speculate": False}
        with closing(begun(server.port, post(long))) as client:
            wait_until(lambda: model.engine.num_unfinished)
            for _ in range(5):
                steps.clear()
                is_asked.set()
                found = answer(server.port, post({**CANARY, "model": "b", "speculate": False}))
                is_asked.clear()
                assert found.json["choices"][0]["text"] == wanted
                first, last = steps.index("b"), len(steps) - steps[::-1].index("b")
                turns = steps[first:last]
                assert len(turns) > 1 and turns == (["b", "a"] * len(turns))[: len(turns)]
            client.close()
            is_over.set()
            is_asked.set()


def test_two_models_end_together(model: fastgen.Generator, other: fastgen.Generator) -> None:
    """The same work for either, begun together: when one ends, most of the other's is done."""
    steps = list[str]()

    def step(name: str) -> None:
        if not steps:
            wait_until(lambda: model.engine.num_unfinished == other.engine.num_unfinished == 4)
        steps.append(name)

    def work(name: str) -> Reply:
        # a token each step: drafts, which go by measured times, make other numbers of steps
        work = {**LONG, "model": name, "max_tokens": 250, "n": 4, "speculate": False}
        return answer(server.port, post(work))

    with (
        serving({"a": model, "b": other}) as server,
        ThreadPoolExecutor(2) as pool,
        stepping(model, partial(step, "a")),
        stepping(other, partial(step, "b")),
    ):
        first, second = pool.map(work, ["a", "b"])
        texts = [[choice["text"] for choice in each.json["choices"]] for each in (first, second)]
        assert texts[0] == texts[1]
    one_ended = len(steps) - 1 - max(steps[::-1].index("a"), steps[::-1].index("b"))
    for name in ("a", "b"):
        assert steps[: one_ended + 1].count(name) > 0.5 * steps.count(name)


def test_a_broken_model_leaves_the_other_alone(
    model: fastgen.Generator, other: fastgen.Generator
) -> None:
    wanted = canary_of(model)
    asked = {"model": "b", "prompt": "Blessed are", "max_tokens": 300, "temperature": 0}
    [generation] = other.generate("Blessed are", max_new_tokens=300, temperature=0)
    with serving({"a": model, "b": other}, queue_config=TERMS) as server:
        with closing(begun(server.port, post({**asked, "stream": True}))) as client:
            with stepping(model, fail):
                for _ in range(4):
                    reply = answer(server.port, post({**SHORT, "model": "a"}))
                    assert reply.status in (500, 503)
            assert text_of(everything(client)) == generation.completions[0].text
        wait_until(lambda: health(server) == (503, 503))
        assert troubles(server) == {"a": "cannot go on"}
        found = answer(server.port, post({"model": "b", "prompt": "And it came to pass",
                                          "max_tokens": 12, "temperature": 0}))  # fmt: skip
        assert found.json["choices"][0]["text"] == wanted


def reused(server: RunningServer, **options: Any) -> int:
    """Tokens of the long beginning that one request found computed already."""
    engine = server.service.models[MODEL].generator.engine
    before = engine.stats.reused_tokens
    key = options.pop("key", None)
    lines = [] if key is None else [f"authorization: Bearer {key}"]
    body = {**SHORT, "prompt": BEGINNING, **options}
    assert answer(server.port, post(body, *lines)).status == 200
    return engine.stats.reused_tokens - before


def test_keys_share_no_prompts_with_each_other(model: fastgen.Generator) -> None:
    with serving({MODEL: model}, keys=Keys(["one", "two"])) as server:
        assert reused(server, key="one") == 0
        assert reused(server, key="two") == 0
        first = reused(server, key="one")
        assert first > 64
        assert reused(server, key="two") == reused(server, key="two", stream=True) == first


def test_salts_of_a_key_share_no_prompts_either(model: fastgen.Generator) -> None:
    with serving({MODEL: model}, keys=Keys(["three", "four"])) as server:
        for key in ("three", "four"):
            for salt in ("x", "y", None):
                assert reused(server, key=key, cache_salt=salt) == 0
                assert reused(server, key=key, cache_salt=salt) > 64


def test_without_keys_all_share(model: fastgen.Generator) -> None:
    with serving({MODEL: model}) as server:
        reused(server)
        assert reused(server) > 64
        assert reused(server, cache_salt="z") == 0


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length, all of them, wherever the right one stands."""
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(first: Any, second: Any) -> bool:
        compared.append((len(first), len(second)))
        return original(first, second)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys(["a", "bb", "c" * 99])
    salts = [keys.salt_of(f"Bearer {key}") for key in ("a", "bb", "c" * 99)]
    assert len(set(salts)) == 3 and "a" not in salts
    assert compared == [(32, 32)] * 9
