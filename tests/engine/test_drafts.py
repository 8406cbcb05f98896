"""Steps with drafts: what is handed out, when, and what is left after them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drafters import KnowingDrafter, drafted_by
from engine_harness import (
    CountingDecoder,
    assert_idle,
    counting_decoder_of,
    greedy,
    make_counting_engine,
    make_engine,
    new_tokens,
    next_counted,
    random_prompt,
    recorder_of,
    run_all,
)
from fastgen import SamplingParams
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request, Row
from fastgen.errors import NothingToDrawError
from fastgen.sampling.draw import Draw
from fastgen.speculation.drafter import Draft, DraftRow, FunctionDrafter

VOCAB_SIZE = CountingDecoder.vocab_size


def counted(token_ids: Sequence[int], most: int) -> list[int]:
    """What a CountingDecoder draws after these."""
    ids = list(token_ids)
    for _ in range(most):
        ids.append(int(next_counted(ids[-1], len(ids) - 1)))
    return ids[len(token_ids) :]


def half_right(token_ids: Sequence[int], most: int) -> list[int]:
    """The second, fourth, ... draft of a row are wrong from their third token on."""
    ids = counted(token_ids, most)
    return ids if len(token_ids) % 2 else [*ids[:2], *((one + 1) % VOCAB_SIZE for one in ids[2:])]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make_counting_engine()
    with drafted_by(made, FunctionDrafter(half_right)):
        yield made
    assert_idle(made)
    assert not counting_decoder_of(made).params, "a seat is still bound"


class Watcher:
    """A listener that does something at the k-th token."""

    def __init__(self, at: int, act: Callable[[Row], object]) -> None:
        self.at, self.act, self.seen = at, act, 0

    def row_drew(self, row: Row) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.act(row)

    def request_ended(self, request: Request) -> None:
        pass


def test_a_step_gives_all_that_was_right_and_one_more(engine: Engine) -> None:
    request = engine.add_request([5], greedy(max_new_tokens=60, logprobs=0))
    run_all(engine, [request])
    [row] = request.rows
    assert row.new_token_ids == counted([5], 60)
    assert [one.token_id for one in row.logprobs or ()] == row.new_token_ids
    stats = engine.stats
    assert stats.steps < 30 and stats.speculated_steps == stats.steps - 1
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.prefill_tokens == 1 and stats.decode_tokens == 59
    timings = request.timings
    assert (timings.steps, timings.drafted_tokens, timings.accepted_tokens) == (
        stats.steps, stats.drafted_tokens, stats.accepted_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("at", range(2, 12))
def test_cancelled_within_a_step_it_ends_at_that_token(engine: Engine, at: int) -> None:
    watcher = Watcher(at, lambda row: engine.cancel(row.request, if_idle=False))
    others = [engine.add_request([7 + n], greedy(max_new_tokens=40)) for n in range(2)]
    request = engine.add_request([5], greedy(max_new_tokens=60), listener=watcher)
    run_all(engine, [request, *others])
    assert new_tokens(request) == [counted([5], at)]
    assert request.rows[0].finish_reason == "cancelled"
    assert [new_tokens(other) for other in others] == [[counted([7 + n], 40)] for n in range(2)]


@pytest.mark.parametrize("at", range(2, 12))
def test_a_deadline_within_a_step_ends_it_at_that_token(
    engine: Engine, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("fastgen.engine.inbox.time", SimpleNamespace(monotonic=lambda: now[0]))
    watcher = Watcher(at, lambda row: now.__setitem__(0, 200.0))
    request = engine.add_request([5], greedy(max_new_tokens=60), listener=watcher, deadline=150.0)
    run_all(engine, [request])
    assert new_tokens(request) == [counted([5], at)]
    assert request.rows[0].finish_reason == "timeout"


@pytest.mark.parametrize("at", range(1, 9))
def test_a_row_that_another_ends_has_what_plain_decoding_gives_it(engine: Engine, at: int) -> None:
    """It gets its token of the same round, whichever stands first in the step."""
    for order in (1, -1):
        plain_engine = make_counting_engine()
        found = []
        for one in (plain_engine, engine):
            victims: list[Request] = []

            def cancel(row: Row, one: Engine = one, victims: list[Request] = victims) -> None:
                one.cancel(victims[0], if_idle=False)

            watcher = Watcher(at, cancel)
            prompts = [([5], watcher), ([6], None)][::order]
            requests = [
                one.add_request(prompt, greedy(max_new_tokens=30), listener=listener)
                for prompt, listener in prompts
            ]
            victims.append(requests[1 if order == 1 else 0])
            run_all(one, requests)
            found.append([new_tokens(request) for request in requests])
        assert found[0] == found[1]


@pytest.mark.parametrize("at", [2, 5, 9])
def test_closed_within_a_step_all_rows_end(at: int) -> None:
    engine = make_counting_engine()

    def close(row: Row) -> None:
        engine._closed = True  # what another thread's close does first

    with drafted_by(engine, FunctionDrafter(half_right)):
        request = engine.add_request([5], greedy(max_new_tokens=60), listener=Watcher(at, close))
        other = engine.add_request([6], greedy(max_new_tokens=60))
        engine.run(lambda: request.done and other.done)
    assert new_tokens(request) == [counted([5], at)]
    assert {one.rows[0].finish_reason for one in (request, other)} == {"cancelled"}


@pytest.mark.parametrize("stop_at", range(1, 14))
def test_an_ending_id_within_a_draft_ends_the_row_there(engine: Engine, stop_at: int) -> None:
    ids = counted([5], 40)
    stop = ids[stop_at]
    request = engine.add_request([5], greedy(max_new_tokens=40, stop_token_ids=[stop]))
    run_all(engine, [request])
    assert new_tokens(request) == [ids[: ids.index(stop) + 1]]
    assert request.rows[0].stop_reason == stop


@pytest.mark.parametrize("fails_at", range(2, 10))
def test_a_sink_that_fails_within_a_step_ends_its_row_alone(engine: Engine, fails_at: int) -> None:
    class Sink:
        stop_reason = None
        seen = 0

        def push(self, token_id: int) -> bool:
            self.seen += 1
            if self.seen == fails_at:
                raise RuntimeError("injected")
            return False

        def finish(self) -> None:
            pass

    request = engine.add_request([5], greedy(max_new_tokens=40), sinks=[Sink()])
    other = engine.add_request([6], greedy(max_new_tokens=40))
    run_all(engine, [request, other])
    assert request.rows[0].finish_reason == "error"
    assert new_tokens(request) == [counted([5], fails_at)]
    assert new_tokens(other) == [counted([6], 40)]


@pytest.mark.parametrize("fails_at", range(2, 10))
def test_a_nan_within_a_draft_ends_its_row_there(
    engine: Engine, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, drawn = counting_decoder_of(engine), [0]
    draw = decoder._draw

    def failing(seat: int, token_id: int) -> Draw:
        drawn[0] += 1
        return Draw(seat, 0, ok=False) if drawn[0] == fails_at else draw(seat, token_id)

    monkeypatch.setattr(decoder, "_draw", failing)
    request = engine.add_request([5], greedy(max_new_tokens=40))
    run_all(engine, [request])
    assert isinstance(request.rows[0].error, NothingToDrawError)
    assert new_tokens(request) == [counted([5], fails_at - 1)]


@pytest.mark.parametrize(("max_tokens", "max_logits"), [(36, 5), (37, 8), (80, 4), (40, 40)])
def test_a_step_keeps_to_its_budgets(max_tokens: int, max_logits: int) -> None:
    """And every row that decodes gets its token."""
    engine = make_counting_engine(seats=4)
    for name, value in (("max_tokens", max_tokens), ("max_logits", max_logits)):
        object.__setattr__(engine.decoder.limits, name, value)
    with drafted_by(engine, FunctionDrafter(counted)):
        requests = [engine.add_request([n + 1], greedy(max_new_tokens=70)) for n in range(9)]
        run_all(engine, requests)  # check_batch holds the budgets
    assert [new_tokens(r) for r in requests] == [[counted([n + 1], 70)] for n in range(9)]
    assert_idle(engine)


def test_prompts_go_before_drafts(engine: Engine) -> None:
    """A step that computes a prompt is full of work already."""
    first = engine.add_request([5], greedy(max_new_tokens=60))
    engine.run(lambda: len(first.rows[0].new_token_ids) > 3)
    drafted = engine.stats.drafted_tokens
    late = engine.add_request(list(range(1, 90)), greedy(max_new_tokens=4))
    engine.run(lambda: len(late.rows[0].new_token_ids) == 1)
    assert engine.stats.drafted_tokens == drafted
    run_all(engine, [first, late])
    assert engine.stats.drafted_tokens > drafted
    assert new_tokens(first) == [counted([5], 60)]


def test_what_drafts_leave_in_the_cache_is_found_and_right() -> None:
    """A row's full blocks are found by who goes on from it, with the bits of plain decoding."""
    engine = make_engine(seats=2)
    rng = np.random.default_rng(5)
    prompt, params = random_prompt(rng, 30), SamplingParams(max_new_tokens=80, seed=4)
    plain = engine.add_request(prompt, params, cache_salt="plain", keeps_logits=True)
    run_all(engine, [plain])
    [tokens] = new_tokens(plain)
    longer = [*prompt, *tokens, 17]
    after = engine.add_request(longer, params, cache_salt="plain", keeps_logits=True)
    run_all(engine, [after])
    known = {(tuple(prompt), plain.rows[0].params.seed): tuple(tokens)}
    with drafted_by(engine, KnowingDrafter(known, 4096, "spoiled")):  # type: ignore[arg-type]
        drafted = engine.add_request(prompt, params, cache_salt="drafted", keeps_logits=True)
        run_all(engine, [drafted])
    assert engine.stats.accepted_tokens > 0
    reused = engine.stats.reused_tokens
    found = engine.add_request(longer, params, cache_salt="drafted", keeps_logits=True)
    run_all(engine, [found])
    assert engine.stats.reused_tokens - reused == 96, "three blocks of the 109 tokens computed"
    for one, other in ((drafted, plain), (found, after)):
        assert new_tokens(one) == new_tokens(other)
        np.testing.assert_array_equal(one.rows[0].raw_logits, other.rows[0].raw_logits)
    assert_idle(engine)


class Failing(FunctionDrafter):
    """Raises where it is told to; never twice for one row."""

    def __init__(self, where: str) -> None:
        super().__init__(counted)
        self.where, self.raised = where, []  # type: ignore[var-annotated]

    def _fail(self, where: str, row: DraftRow) -> None:
        if where == self.where and row.token_ids[0] % 2:
            self.raised.append(row)
            raise SystemExit("injected") if where == "propose" else ValueError("injected")

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        for row in rows:
            self._fail("propose", row)
        return super().propose(rows, most)

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        self._fail("accepted", row)

    def ended(self, row: DraftRow) -> None:
        self._fail("ended", row)


@pytest.mark.parametrize("where", ["propose", "accepted", "ended"])
def test_a_drafter_that_fails_costs_its_rows_their_drafts_alone(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine, drafter = make_counting_engine(), Failing(where)
    with drafted_by(engine, drafter), caplog.at_level(logging.ERROR, "fastgen"):
        requests = [engine.add_request([n + 1], greedy(max_new_tokens=50)) for n in range(4)]
        run_all(engine, requests)
    assert [new_tokens(r) for r in requests] == [[counted([n + 1], 50)] for n in range(4)]
    assert len([one for one in caplog.records if "drafter" in one.message]) == 1
    drafted = [request.timings.drafted_tokens for request in requests]
    assert min(drafted[1::2]) > 0
    if where == "propose":
        assert max(drafted[::2]) == 0
    assert_idle(engine)


def test_a_drafter_hears_of_each_row_once_and_is_closed_with_the_engine() -> None:
    engine = make_counting_engine()
    drafter = KnowingDrafter({}, VOCAB_SIZE, "random")
    engine.drafting.use([drafter])
    requests = [engine.add_request([n + 1], greedy(max_new_tokens=n + 1)) for n in range(6)]
    engine.cancel(requests[5])
    run_all(engine, requests)
    ended = [row for request in requests[:5] for row in request.rows]
    assert sorted(drafter.ended_rows, key=id) == sorted(ended, key=id)
    assert engine.drafting._rows == {}
    engine.close()
    assert drafter.is_closed


def test_a_request_brings_its_own_drafter() -> None:
    engine = make_counting_engine()
    asked: list[int] = []

    def function(token_ids: Sequence[int], most: int) -> list[int]:
        asked.append(token_ids[0])
        return counted(token_ids, most)

    own = FunctionDrafter(function)
    first = engine.add_request([5], greedy(max_new_tokens=40), drafter=own)
    second = engine.add_request([6], greedy(max_new_tokens=40))
    run_all(engine, [first, second])
    assert set(asked) == {5}
    assert first.timings.accepted_tokens > 0 == second.timings.drafted_tokens
    assert engine.drafting._sources == {}, "it is forgotten with its last request"


@pytest.mark.parametrize("right", [True, False])
def test_a_step_is_waited_for_where_drafts_may_follow(right: bool) -> None:
    """On a decoder that runs ahead: a text that cannot be guessed soon runs ahead again."""
    engine = make_engine(decoder="late")
    params = greedy(max_new_tokens=120, ignore_eos=True, seed=1)
    plain = engine.add_request([5, 6], params)
    run_all(engine, [plain])
    known: Any = {((5, 6), plain.rows[0].params.seed): tuple(new_tokens(plain)[0])}
    before = len(recorder_of(engine).batches)
    drafter = KnowingDrafter(known, 4096, "spoiled" if right else "none")
    with drafted_by(engine, drafter):
        drafted = engine.add_request([5, 6], params)
        run_all(engine, [drafted])
    assert new_tokens(drafted) == new_tokens(plain)
    batches = recorder_of(engine).batches[before:]
    ahead = [bool((batch.token_ids < 0).any()) for batch in batches]
    if right:
        assert len(batches) < 80 and not any(ahead)
    else:
        assert not any(ahead[:8]) and sum(ahead) > 80
    assert_idle(engine)
