"""Faults at every stage of one request's way through the server, as in test_faults.py: {exception,
NaN, delay, cancel} strikes the victim once; cancel is that its client hangs up at that moment.

Two requests run beside the victim, one streamed and one not, and one comes behind it. In every cell
theirs are the texts of an undisturbed run, the victim has an answer or an error in OpenAI's form,
the next request is exact within two seconds, and every block and seat is free in the end. An
exception in the decoder's step is the whole step's: there the rows that run fail with the victim.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import fastgen
from engine_harness import assert_idle, block_pool, running_rows
from fastgen.decoders.interface import StepBatch
from fastgen.engine.requests import Request, Row
from fastgen.sampling.draw import Draw
from fastgen.server.completions import Answer
from poisoned import POISON, save_poisoned
from server_harness import MODEL, RunningServer, serving
from text_parts import detokenizer_of, tokenizer_of
from waits import WITHIN, wait_until

STAGES = ("tokenize", "admit", "allocate", "prefill", "decode", "detokenize", "emit", "answer")
KINDS = ("exception", "NaN", "delay", "cancel")
WITHOUT_SENSE = {("admit", "NaN"), ("allocate", "NaN")}  # of these an engine's own tests know
VICTIM = "And it came to pass in those days, that there went out a decree " * 5  # 3 blocks
NEVER = "\x00never"  # a stop string, so that text is made while tokens come
SECRET = "/home/someone/secret.py"


class InjectedError(Exception):
    pass


def body(prompt: str, **options: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, "ignore_eos": True, "stop": NEVER, "max_tokens": 100}
    return {"prompt": prompt, **greedy, **options}


BESIDE = [
    body("In the beginning", stream=True),
    body("Blessed are the meek", temperature=1, seed=3),
]
BEHIND = body("The LORD is my", max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastgen.Generator]:
    folder = save_poisoned(tmp_path_factory.mktemp("poisoned"))
    with fastgen.load(
        folder, decoder="cpu", max_batch_size=3, max_seq_len=256, speculate="off"
    ) as loaded:  # each step gives a token
        yield loaded


@pytest.fixture(scope="module")
def texts(model: fastgen.Generator) -> dict[str, str]:
    """Of an undisturbed run, by prompt."""
    found = {}
    for asked in (*BESIDE, BEHIND, body(VICTIM, max_tokens=8)):
        options = {name: asked[name] for name in asked.keys() - {"prompt", "max_tokens", "stream"}}
        [done] = model.generate(asked["prompt"], max_new_tokens=asked["max_tokens"], **options)
        found[asked["prompt"]] = done.text
    return found


@dataclass
class Outcome:
    """What a client has had."""

    status: int = 0
    text: str = ""
    error: dict[str, Any] | None = None
    left: bool = False

    def assert_is(self, text: str) -> None:
        assert (self.error, self.status, self.text) == (None, 200, text)

    def assert_failed(self, status: int, *, streams: bool) -> None:
        """With an error in OpenAI's form; once a stream has begun its status has been sent."""
        assert self.error is not None and not self.left
        assert self.status in ({200, status} if streams else {status})
        assert set(self.error) == {"message", "type", "param", "code"}
        assert SECRET not in str(self.error) and "Traceback" not in str(self.error)
        wanted = "server_error" if status == 500 else "invalid_request_error"
        assert self.error["type"] == wanted and len(self.error["message"]) > 10


class Client:
    """One connection; `hang_up` may be called from another thread."""

    def __init__(self, server: RunningServer) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WITHIN)
        self._connection.connect()
        self._left = False

    def hang_up(self) -> None:
        self._left = True
        self._connection.sock.shutdown(socket.SHUT_RDWR)

    def ask(self, asked: dict[str, Any]) -> Outcome:
        try:
            self._connection.request("POST", "/v1/completions", json.dumps(asked))
            response = self._connection.getresponse()
            sent = response.read().decode()
        except (OSError, http.client.HTTPException):
            assert self._left
            return Outcome(left=True)
        finally:
            self._connection.close()
        if response.headers["content-type"] == "application/json":
            return _outcome(response.status, [json.loads(sent)])
        assert response.headers["content-type"].startswith("text/event-stream"), sent
        *events, done, end = sent.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return _outcome(response.status, [json.loads(each[6:]) for each in events])


def _outcome(status: int, objects: list[dict[str, Any]]) -> Outcome:
    text = "".join(each["choices"][0]["text"] for each in objects if "choices" in each)
    return Outcome(status, text, objects[-1].get("error"))


@dataclass
class Scene:
    """The victim, and how it is struck: once."""

    model: fastgen.Generator
    patch: pytest.MonkeyPatch
    kind: str
    client: Client
    prompt: tuple[int, ...]
    victim: Request | None = None
    strikes: int = 0
    num_running: int = 0  # rows, at that moment
    wrap_sinks: Callable[[Any], None] = field(default=lambda sinks: None)

    def remember(self) -> None:
        """Know the victim's request as soon as there is one."""
        add = self.model.engine.add_request

        def add_request(token_ids: Any, *args: Any, **options: Any) -> Request:
            if tuple(token_ids) != self.prompt:
                return add(token_ids, *args, **options)
            self.wrap_sinks(options["sinks"])
            self.victim = add(token_ids, *args, **options)
            return self.victim

        self.patch.setattr(self.model.engine, "add_request", add_request)

    def faulty(
        self,
        original: Callable[..., Any],
        with_nan: Callable[..., Any],
        is_victims: Callable[..., bool],
    ) -> Callable[..., Any]:
        """`original`, struck the first time that it works for the victim."""

        def struck(*args: Any, **options: Any) -> Any:
            if self.strikes or not is_victims(*args):
                return original(*args, **options)
            self.num_running = self.model.engine.num_unfinished
            self.strikes += 1
            if self.kind == "exception":
                raise InjectedError(SECRET)
            if self.kind == "cancel":
                self.client.hang_up()
            if self.kind != "NaN":
                time.sleep(0.05)
            return (with_nan if self.kind == "NaN" else original)(*args, **options)

        return struck

    def is_row(self, row: Row) -> bool:
        return self.victim is not None and row is self.victim.rows[0]


def hold_those_beside(scene: Scene) -> None:
    """They do not end before the victim has come, however slow its client is."""
    decoder, engine = scene.model.engine.decoder, scene.model.engine
    original = decoder.step

    def held(batch: StepBatch) -> Any:
        if any(len(row.new_token_ids) > 30 for row in running_rows(engine)):
            wait_until(lambda: scene.victim is not None or scene.strikes)
        return original(batch)

    scene.patch.setattr(decoder, "step", held)


def tokenize(scene: Scene) -> None:
    tokenizer = tokenizer_of(scene.model)
    encode = scene.faulty(
        tokenizer.encode, lambda texts, longest: [[math.nan]], lambda texts, *rest: VICTIM in texts
    )
    scene.patch.setattr(tokenizer, "encode", encode)


def admit(scene: Scene) -> None:
    decoder = scene.model.engine.decoder
    bind = scene.faulty(
        decoder.bind, decoder.bind, lambda seat, params, ids: tuple(ids) == scene.prompt
    )
    scene.patch.setattr(decoder, "bind", bind)


def allocate(scene: Scene) -> None:
    pool = block_pool(scene.model.engine)
    original = pool.allocate  # the victim is the next to be given any
    struck = scene.faulty(original, original, lambda count: scene.victim is not None)
    scene.patch.setattr(pool, "allocate", struck)


def step(scene: Scene, num_new: int) -> None:
    """In the step that draws the victim's next token when it has so many new ones."""
    decoder = scene.model.engine.decoder
    original = decoder.step

    def at(batch: StepBatch) -> list[int]:
        """Which rows of logits are the victim's."""
        if scene.victim is None:
            return []
        victim, seats = scene.victim.rows[0].schedule.seat, batch.seats.tolist()
        return [i for i, seat in enumerate(seats) if seat == victim >= 0]

    def with_nan(batch: StepBatch) -> Any:
        token_ids = batch.token_ids.copy()
        token_ids[batch.logits_at[at(batch)]] = POISON
        return original(replace(batch, token_ids=token_ids))

    def is_victims(batch: StepBatch) -> bool:
        if scene.victim is None or not at(batch):
            return False
        return len(scene.victim.rows[0].new_token_ids) == num_new

    scene.patch.setattr(decoder, "step", scene.faulty(original, with_nan, is_victims))


def detokenize(scene: Scene) -> None:
    def wrap(sinks: Any) -> None:
        detokenizer = detokenizer_of(sinks[0])
        push = scene.faulty(detokenizer.push, lambda token_id: math.nan, lambda token_id: True)
        detokenizer.push = push

    scene.wrap_sinks = wrap


def emit(scene: Scene) -> None:
    accept = Row.accept

    def accept_none(row: Row, draw: Draw, eos_ids: frozenset[int]) -> None:
        accept(row, draw._replace(ok=False), eos_ids)

    struck = scene.faulty(accept, accept_none, lambda row, *args: scene.is_row(row))
    scene.patch.setattr(Row, "accept", lambda *args: struck(*args))


def answer(scene: Scene) -> None:
    """What is sent; NaN is a number in it that JSON has not."""
    original = Answer.object

    def with_nan(self: Answer, choices: Any) -> Any:
        return original(self, choices) | {"created": math.nan}

    def is_victims(self: Answer, *args: Any) -> bool:
        return self._request.prompts == [VICTIM]

    struck = scene.faulty(original, with_nan, is_victims)
    scene.patch.setattr(Answer, "object", lambda *args: struck(*args))


INJECT: dict[str, Callable[[Scene], None]] = {
    "tokenize": tokenize,
    "admit": admit,
    "allocate": allocate,
    "prefill": lambda scene: step(scene, 0),
    "decode": lambda scene: step(scene, 3),
    "detokenize": detokenize,
    "emit": emit,
    "answer": answer,
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stage", "kind"),
    [(stage, kind) for stage in STAGES for kind in KINDS if (stage, kind) not in WITHOUT_SENSE],
)
def test_a_fault_hurts_its_own_request(
    model: fastgen.Generator,
    server: RunningServer,
    texts: dict[str, str],
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    kind: str,
    streams: bool,
) -> None:
    [prompt] = tokenizer_of(model).encode([VICTIM])
    scene = Scene(model, monkeypatch, kind, Client(server), tuple(prompt))
    scene.remember()
    hold_those_beside(scene)
    beside = [pool.submit(Client(server).ask, asked) for asked in BESIDE]
    wait_until(lambda: len(running_rows(model.engine)) == 2)
    INJECT[stage](scene)
    asked = body(VICTIM, max_tokens=100 if kind == "cancel" else 8, stream=streams)
    struck: Future[Outcome] = pool.submit(scene.client.ask, asked)
    wait_until(lambda: bool(scene.strikes))
    assert scene.num_running >= 2 or stage == "answer", "nothing ran beside it"
    behind = pool.submit(Client(server).ask, BEHIND)
    outcome = struck.result(WITHIN)
    monkeypatch.undo()

    Client(server).ask(body(VICTIM, max_tokens=8)).assert_is(texts[VICTIM])

    assert scene.strikes == 1
    if kind == "delay":
        outcome.assert_is(texts[VICTIM])
    elif kind == "cancel":
        assert outcome.left
    else:
        outcome.assert_failed(400 if (stage, kind) == ("tokenize", "NaN") else 500, streams=streams)
    for asked, future in zip(BESIDE, beside, strict=True):
        if kind == "exception" and stage in ("prefill", "decode"):
            future.result(WITHIN).assert_failed(500, streams="stream" in asked)
        else:
            future.result(WITHIN).assert_is(texts[asked["prompt"]])
    behind.result(WITHIN).assert_is(texts[BEHIND["prompt"]])
    wait_until(lambda: not model.engine.num_unfinished)
    assert_idle(model.engine)
    assert kind != "cancel" or scene.victim is None or stage == "answer" or ended_early(scene)
    assert server.service.troubles == {}


def ended_early(scene: Scene) -> bool:
    return scene.victim is not None and scene.victim.rows[0].finish_reason == "cancelled"


def test_a_decoder_that_is_lost_is_said_to_be_lost() -> None:
    with fastgen.load(max_batch_size=2) as model, serving({MODEL: model}) as server:
        decoder: Any = model.engine.decoder

        def broken(batch: StepBatch) -> Any:
            raise InjectedError(SECRET)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "step", broken)
            for streams in (False, True, False):
                asked = body("And", stream=streams)
                Client(server).ask(asked).assert_failed(500, streams=streams)
        wait_until(lambda: server.service.is_lost)
        for streams in (False, True):
            lost = Client(server).ask(body("And", stream=streams))
            assert lost.status == 503 and lost.error is not None
            assert SECRET not in str(lost.error) and lost.error["code"] == "unavailable"
