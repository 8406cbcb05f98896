"""What fails while one row is admitted ends its request alone, and leaves nothing behind; on a
decoder that only counts, so that every call can be the one that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from engine_harness import (
    CountingDecoder,
    assert_idle,
    check_blocks,
    counting_decoder_of,
    greedy,
    make_counting_engine,
    new_tokens,
    random_prompt,
    run_all,
)
from fastgen.engine.blocks import BlockPool
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request

RNG = np.random.default_rng(0)
PROMPTS = [[token % 97 for token in random_prompt(RNG, length)] for length in (40, 9, 70)]


@dataclass
class Failing:
    """A function whose k-th call raises (None: none does); counts its calls."""

    original: Callable[..., Any]
    which: int | None
    error: type[BaseException] = MemoryError
    calls: int = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.which:
            raise self.error("injected")
        return self.original(*args, **options)

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return lambda *args, **options: self(instance, *args, **options)  # as a method


STAGES = {
    "allocate": (BlockPool, "allocate"),
    "share": (BlockPool, "share"),
    "announce or register": (BlockPool, "register"),
    "bind": (CountingDecoder, "bind"),
    "copy": (CountingDecoder, "copy_blocks"),
    "hash a prompt": ("fastgen.engine.requests", "block_keys"),
    "hash a block": ("fastgen.engine.leases", "next_key"),
}


def add_mixed(engine: Engine) -> list[Request]:
    """Samples, shared beginnings, copies on write, scores; more rows than seats."""
    return [
        engine.add_request(PROMPTS[0], greedy(n=3, max_new_tokens=30)),
        engine.add_request(PROMPTS[2], greedy(max_new_tokens=5)),
        engine.add_request(PROMPTS[2][:50], greedy(max_new_tokens=20), priority=-1),
        engine.add_request(PROMPTS[1], greedy(max_new_tokens=4, prompt_logprobs=0)),
        engine.add_request([*PROMPTS[0][:32], 5], greedy(max_new_tokens=3), priority=1),
    ]


def run_with(stage: str, which: int | None) -> tuple[list[Request], int, Engine]:
    place, name = STAGES[stage]
    engine = make_counting_engine(num_blocks=12)
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(place, str):
            module = __import__(place, fromlist=[name])
            failing = Failing(getattr(module, name), which)
            patch.setattr(module, name, lambda *args: failing(*args))
        else:
            failing = Failing(getattr(place, name), which)
            patch.setattr(place, name, failing)
        requests = add_mixed(engine)
        run_all(engine, requests)
    return requests, failing.calls, engine


def assert_exact(request: Request) -> None:
    """What the decoder that counts continues a prompt with."""
    for row in request.rows:
        expected = list(request.prompt_token_ids)
        for at in range(len(expected) - 1, row.max_len - 1):
            expected.append((31 * expected[-1] + 7 * at + 11) % 97)
        assert row.token_ids == expected
        assert row.finish_reason == "length"


@pytest.mark.parametrize("stage", STAGES)
def test_the_failure_ends_one_request_alone(stage: str) -> None:
    """At the k-th call, for every k there is."""
    requests, calls, engine = run_with(stage, None)
    for request in requests:
        assert_exact(request)
    assert calls >= 2
    for which in range(calls):
        requests, _, engine = run_with(stage, which)
        hurt = [request for request in requests if any(row.error for row in request.rows)]
        assert len(hurt) == 1
        assert all(r.finish_reason == "error" for r in hurt[0].rows if r.error is not None)
        assert all(isinstance(r.error, (MemoryError, type(None))) for r in hurt[0].rows)
        assert hurt[0].done and hurt[0].error is None
        for request in requests:
            if request not in hurt:
                assert_exact(request)
        assert_idle(engine)
        assert counting_decoder_of(engine).params == {}, "a seat is still bound"
        again = add_mixed(engine)
        run_all(engine, again)
        for request in again:
            assert_exact(request)
        assert_idle(engine)


def test_an_interrupt_while_blocks_are_taken_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C acts at once; the row whose blocks were being taken goes on waiting."""
    engine = make_counting_engine()
    requests = add_mixed(engine)
    failing = Failing(BlockPool.allocate, 2, KeyboardInterrupt)
    monkeypatch.setattr(BlockPool, "allocate", failing)
    with pytest.raises(KeyboardInterrupt):
        run_all(engine, requests)
    check_blocks(engine)
    run_all(engine, requests, may_fail=True)
    assert all(request.done for request in requests)
    assert_idle(engine)
    assert sum(request.error is None for request in requests) >= 2


def test_a_failing_release_still_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_counting_engine()

    def failing(seat: int) -> None:
        del counting_decoder_of(engine).params[seat]
        raise OSError("injected")

    monkeypatch.setattr(engine.decoder, "release", failing)
    request = engine.add_request(PROMPTS[1], greedy(max_new_tokens=3))
    run_all(engine, [request], may_fail=True)
    assert len(new_tokens(request)[0]) == 3
    assert_idle(engine)
