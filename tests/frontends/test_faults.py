"""Faults at every stage of one row's way: {exception, NaN, delay, cancel} strikes the victim once.

Two rows run beside the victim and one waits behind it, on the bundled model and each decoder that
a CPU has. In every cell their tokens and text are those of an undisturbed run, every block and seat
is free in the end, the victim has ended, and a next request is exact. Where a cell has no literal
sense it has the nearest one:

- tokenize: the victim has no row yet, so what fails comes to its caller; NaN is an id that is NaN,
  cancel is Ctrl-C.
- admit: binding the seat; NaN is a deadline that is NaN, which is refused.
- allocate: NaN is what the memory of the blocks holds when the victim gets them: it is exact.
- prefill, decode: an exception is the whole step's, so the rows that run fail with the victim, and
  the waiting one is the bystander; NaN are the victim's logits, keys and values.
- sample: the victim's own logits_processor, on the host.
- detokenize: NaN is what comes instead of text.
- emit: handing the row its token; NaN is a draw that the decoder marks as none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import fastgen
from agreement import assert_rows_agree
from engine_harness import assert_idle, block_pool, greedy, random_prompt
from fastgen import SamplingParams
from fastgen.decoders.interface import StepBatch
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.requests import Request, Row
from fastgen.sampling.draw import Draw
from fastgen.text.detokenizer import TextSink
from late_decoder import LateDecoder
from poisoned import POISON, save_poisoned
from text_parts import codec_of, detokenizer_of, tokenizer_of

STAGES = ("tokenize", "admit", "allocate", "prefill", "decode", "sample", "detokenize", "emit")
KINDS = ("exception", "NaN", "delay", "cancel")
TEXT = "And it came to pass in those days, that there went out a decree"
RNG = np.random.default_rng(0)
PROMPTS = [random_prompt(RNG, length) for length in (40, 9, 70)]
NEVER = "\x00never"  # a stop string, so that text is made while tokens come
PARAMS = [
    greedy(max_new_tokens=24, ignore_eos=True, stop=NEVER),
    SamplingParams(seed=3, max_new_tokens=24, ignore_eos=True, top_k=50, stop=NEVER),
    SamplingParams(seed=4, max_new_tokens=10, ignore_eos=True, stop=NEVER),
]
VICTIMS = greedy(max_new_tokens=8, ignore_eos=True, stop=NEVER)


class InjectedError(Exception):
    pass


@pytest.fixture(scope="module", params=["cpu", "torch", "late"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[fastgen.Generator]:
    folder = save_poisoned(tmp_path_factory.mktemp("poisoned"))
    # faults strike at a row's k-th step: each gives it one token
    options: dict[str, Any] = {"max_batch_size": 3, "max_seq_len": 128, "speculate": "off"}
    name = "cpu" if request.param == "late" else request.param
    with fastgen.load(folder, decoder=name, **options) as loaded:
        if request.param == "late":
            loaded.engine.decoder = LateDecoder(loaded.engine.decoder)
        yield loaded


def add(
    model: fastgen.Generator, prompt: list[int], params: SamplingParams, **options: Any
) -> Request:
    sinks = codec_of(model).sinks(params)
    return model.engine.add_request(prompt, params, sinks=sinks, **options)


def run_all(model: fastgen.Generator, requests: list[Request]) -> None:
    model.engine.run(lambda: all(request.done for request in requests))


@dataclass
class Scene:
    """Two rows that run, one that waits, and the victim, which is struck once."""

    model: fastgen.Generator
    patch: pytest.MonkeyPatch
    kind: str
    running: list[Request]
    victim: Request | None = None
    caught: BaseException | None = None
    strikes: int = 0

    def faulty(
        self,
        original: Callable[..., Any],
        with_nan: Callable[..., Any],
        is_victims: Callable[..., bool] = lambda *args: True,
    ) -> Callable[..., Any]:
        """`original`, struck the first time that it works for the victim."""

        def struck(*args: Any, **options: Any) -> Any:
            if self.strikes or not is_victims(*args):
                return original(*args, **options)
            self.strikes += 1
            if self.kind == "exception":
                raise InjectedError
            if self.kind == "cancel":
                if self.victim is None:
                    raise KeyboardInterrupt
                self.model.engine.cancel(self.victim)
            if self.kind == "delay":
                time.sleep(0.05)
            return (with_nan if self.kind == "NaN" else original)(*args, **options)

        return struck

    @property
    def row(self) -> Row:
        assert self.victim is not None
        return self.victim.rows[0]

    def add_victim(self, params: SamplingParams = VICTIMS, **options: Any) -> None:
        [prompt] = codec_of(self.model).token_ids([TEXT])
        self.victim = add(self.model, prompt, params, **options)


def tokenize(scene: Scene) -> None:
    tokenizer, engine = tokenizer_of(scene.model), scene.model.engine
    engine_add = engine.add_request

    def remember(*args: Any, **options: Any) -> Request:
        scene.victim = engine_add(*args, **options)
        return scene.victim

    encode = scene.faulty(tokenizer.encode, lambda texts, longest: [[math.nan]])
    with scene.patch.context() as patch:
        patch.setattr(tokenizer, "encode", encode)
        patch.setattr(engine, "add_request", remember)
        try:
            scene.model.generate(TEXT, VICTIMS)
        except (Exception, KeyboardInterrupt) as error:
            scene.caught = error


def admit(scene: Scene) -> None:
    if scene.kind == "NaN":
        scene.strikes += 1
        try:
            scene.add_victim(deadline=math.nan)
        except ValueError as error:
            scene.caught = error
        return
    scene.add_victim()
    decoder = scene.model.engine.decoder
    bind = scene.faulty(
        decoder.bind, decoder.bind, lambda seat, *args: seat == scene.row.schedule.seat
    )
    scene.patch.setattr(decoder, "bind", bind)


def allocate(scene: Scene) -> None:
    pool = block_pool(scene.model.engine)
    original = pool.allocate

    def full_of_nan(count: int) -> list[int]:
        blocks = original(count)
        logits = scene.model.engine.decoder.forward(poison_for(blocks))
        assert np.isnan(np.asarray(logits)).all()
        return blocks

    scene.add_victim()  # the next to be given blocks
    scene.patch.setattr(pool, "allocate", scene.faulty(original, full_of_nan))


def poison_for(blocks: list[int]) -> StepBatch:
    """A row for each block, which fills it with NaN."""
    count, size = len(blocks), BLOCK_SIZE
    return StepBatch.ragged(
        token_ids=[POISON] * (count * size),
        counts=[size] * count,
        cache_lens=[0] * count,
        block_tables=np.array(blocks, np.int32)[:, None],
        logits_at=[size - 1],
        seats=[-1],
    )


def step(scene: Scene, num_new: int) -> None:
    """In the step that draws the victim's next token when it has so many new ones."""
    decoder = scene.model.engine.decoder
    original = decoder.step

    def at(batch: StepBatch) -> list[int]:
        """Which rows of logits are the victim's."""
        seats = batch.seats.tolist()
        return [index for index, seat in enumerate(seats) if seat == scene.row.schedule.seat >= 0]

    def with_nan(batch: StepBatch) -> Any:
        token_ids = batch.token_ids.copy()
        token_ids[batch.logits_at[at(batch)]] = POISON
        return original(replace(batch, token_ids=token_ids))

    def is_victims(batch: StepBatch) -> bool:
        return bool(at(batch)) and len(scene.row.new_token_ids) == num_new

    scene.add_victim()
    scene.patch.setattr(decoder, "step", scene.faulty(original, with_nan, is_victims))


def sample(scene: Scene) -> None:
    function = scene.faulty(lambda ids, logits: logits, lambda ids, logits: logits * math.nan)
    scene.add_victim(replace(VICTIMS, logits_processor=function))


def detokenize(scene: Scene) -> None:
    scene.add_victim()
    detokenizer = detokenizer_of(scene.row.sink)
    push = scene.faulty(detokenizer.push, lambda token_id: math.nan)
    scene.patch.setattr(detokenizer, "push", push)


def emit(scene: Scene) -> None:
    scene.add_victim()
    accept = Row.accept

    def accept_none(row: Row, draw: Draw, eos_ids: frozenset[int]) -> None:
        accept(row, draw._replace(ok=False), eos_ids)

    struck = scene.faulty(accept, accept_none, lambda row, *args: row is scene.row)
    scene.patch.setattr(Row, "accept", lambda *args: struck(*args))


INJECT: dict[str, Callable[[Scene], None]] = {
    "tokenize": tokenize,
    "admit": admit,
    "allocate": allocate,
    "prefill": lambda scene: step(scene, 0),
    "decode": lambda scene: step(scene, 3),
    "sample": sample,
    "detokenize": detokenize,
    "emit": emit,
}
REFUSED = {("tokenize", "exception"), ("tokenize", "NaN"), ("tokenize", "cancel"), ("admit", "NaN")}


def ending(stage: str, kind: str) -> str:
    if kind == "delay" or (stage, kind) == ("allocate", "NaN"):
        return "length"
    return "cancelled" if kind == "cancel" else "error"


@pytest.fixture(scope="module")
def undisturbed(model: fastgen.Generator) -> list[Request]:
    """The two that run, the one that waits, the victim."""
    [prompt] = codec_of(model).token_ids([TEXT])
    requests = [
        add(model, p, o) for p, o in zip([*PROMPTS, prompt], [*PARAMS, VICTIMS], strict=True)
    ]
    run_all(model, requests)
    return requests


def assert_exact(found: Request, wanted: Request) -> None:
    assert found.error is None
    [row], [expected] = found.rows, wanted.rows
    assert row.finish_reason == expected.finish_reason
    assert_rows_agree(
        found.prompt_token_ids, expected.params, row.new_token_ids, expected.new_token_ids
    )
    assert isinstance(row.sink, TextSink) and isinstance(expected.sink, TextSink)
    assert row.sink.text == expected.sink.text or row.new_token_ids != expected.new_token_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_hurts_its_own_row(
    model: fastgen.Generator,
    undisturbed: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    kind: str,
) -> None:
    running = [add(model, *each) for each in zip(PROMPTS[:2], PARAMS[:2], strict=True)]
    model.engine.run(lambda: all(len(request.rows[0].new_token_ids) > 1 for request in running))
    scene = Scene(model, monkeypatch, kind, running)
    INJECT[stage](scene)
    waiting = add(model, PROMPTS[2], PARAMS[2])
    run_all(model, [*running, waiting])
    if scene.victim is not None:
        run_all(model, [scene.victim])
    monkeypatch.undo()
    assert scene.strikes == 1, "the fault did not happen"
    assert_idle(model.engine)

    if (stage, kind) in REFUSED:
        assert scene.victim is None
        assert isinstance(scene.caught, (InjectedError, KeyboardInterrupt, TypeError, ValueError))
    else:
        assert scene.caught is None
        assert scene.row.finish_reason == ending(stage, kind)
        assert (scene.row.error is not None) == (ending(stage, kind) == "error")
    if scene.victim is not None and ending(stage, kind) == "length":
        assert_exact(scene.victim, undisturbed[3])

    if kind == "exception" and stage in ("prefill", "decode"):
        assert {request.rows[0].finish_reason for request in running} == {"error"}
        assert all(isinstance(request.error, InjectedError) for request in running)
    else:
        for found, wanted in zip(running, undisturbed, strict=False):
            assert_exact(found, wanted)
    assert_exact(waiting, undisturbed[2])

    scene.add_victim()
    assert scene.victim is not None
    run_all(model, [scene.victim])
    assert_exact(scene.victim, undisturbed[3])
    assert_idle(model.engine)
