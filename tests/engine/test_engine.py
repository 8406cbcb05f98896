"""The engine's promises, counted on a real decoder: budgets, order, reuse, endings, isolation."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastgen
from engine_harness import (
    assert_idle,
    greedy,
    make_counting_engine,
    make_engine,
    new_tokens,
    random_prompt,
    recorder_of,
    run_all,
)
from fastgen.engine.engine import Engine
from fastgen.engine.inbox import deadline_in
from fastgen.engine.requests import Request
from fastgen.engine.scheduler import is_prefilling
from waits import WITHIN


@pytest.fixture(params=["auto", "late"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return make_engine(decoder=request.param)


def add_mixed(engine: Engine, rng: np.random.Generator, count: int) -> list[Request]:
    return [
        engine.add_request(
            random_prompt(rng, int(rng.integers(1, 120))),
            fastgen.SamplingParams(
                seed=index,
                temperature=float(rng.choice([0.0, 0.7, 1.3])),
                top_k=40,
                max_new_tokens=int(rng.integers(1, 40)),
            ),
        )
        for index in range(count)
    ]


def test_no_step_exceeds_the_budget_and_every_decoding_row_gets_its_token(engine: Engine) -> None:
    requests = add_mixed(engine, np.random.default_rng(1), 24)
    rows = [row for request in requests for row in request.rows]
    recorder = recorder_of(engine)
    fed: list[tuple[int, int]] = []  # rows that decode, and rows that get one token, in each step

    def count(batch: object) -> None:
        running = [r for r in rows if r.schedule.seat >= 0 and r.finish_reason is None]
        decoding = [
            r
            for r in running
            if not is_prefilling(r) and len(r.token_ids) + r.schedule.num_under_way < r.max_len
        ]
        seats = set(recorder.batches[-1].seats.tolist())
        fed.append((len(decoding), sum(row.schedule.seat in seats for row in decoding)))

    recorder.before_step = count
    run_all(engine, requests)
    assert max(recorder.step_tokens) <= recorder.limits.max_tokens
    assert engine.stats.largest_step == max(recorder.step_tokens)
    assert all(decoding == served for decoding, served in fed)
    assert max(decoding for decoding, _ in fed) >= 3, "the test must have had rows side by side"
    assert_idle(engine)


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding_rows() -> None:
    engine = make_engine(seats=2, max_seq_len=1024)
    rng = np.random.default_rng(2)
    short = engine.add_request(random_prompt(rng, 4), greedy(max_new_tokens=30, ignore_eos=True))
    engine.run(lambda: len(short.rows[0].new_token_ids) >= 5)
    before = len(recorder_of(engine).batches)
    long = engine.add_request(random_prompt(rng, 900), greedy(max_new_tokens=2, ignore_eos=True))
    engine.run(lambda: len(long.rows[0].new_token_ids) >= 1)
    steps = recorder_of(engine).batches[before:]
    budget = engine.decoder.limits.max_tokens
    assert len(steps) == -(-900 // (budget - 1)), "the prompt takes what the decoding row leaves"
    assert all(len(batch.cache_lens) == 2 for batch in steps), "both rows are in every step"
    assert len(short.rows[0].new_token_ids) == 5 + len(steps)
    run_all(engine, [short, long])
    assert_idle(engine)


def test_requests_are_admitted_in_order() -> None:
    engine = make_engine(seats=2)
    requests = add_mixed(engine, np.random.default_rng(3), 12)
    run_all(engine, requests)
    admitted = [request.admitted or 0 for request in requests]
    assert admitted == sorted(admitted)
    assert_idle(engine)


def test_urgent_requests_are_admitted_first() -> None:
    engine = make_counting_engine(seats=2)
    order = [0, 3, -1, 0, -1000, 1000, 3, -1]
    params = greedy(max_new_tokens=3)
    requests = [engine.add_request([1, 2], params, priority=priority) for priority in order]
    run_all(engine, requests)
    by_admission = sorted(range(len(order)), key=lambda index: requests[index].admitted or 0)
    assert by_admission == sorted(range(len(order)), key=lambda index: (order[index], index))
    assert_idle(engine)


def test_more_samples_than_seats_and_each_repeats_with_its_own_seed(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(4), 20)
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    request = engine.add_request(prompt, fastgen.SamplingParams(n=10, seed=99, **options))
    run_all(engine, [request])
    assert len({tuple(tokens) for tokens in new_tokens(request)}) > 5
    for row in request.rows[:3]:
        again = engine.add_request(prompt, fastgen.SamplingParams(seed=row.params.seed, **options))
        run_all(engine, [again])
        assert new_tokens(again) == [row.new_token_ids]
    assert_idle(engine)


@pytest.mark.parametrize("length", [5, 32, 33, 64, 100])
def test_a_shared_prompt_is_prefilled_once(engine: Engine, length: int) -> None:
    """Samples after the first compute only the prompt's last token, for its logits."""
    prompt = random_prompt(np.random.default_rng(length), length)
    samples = 9  # more than seats: some are admitted late
    request = engine.add_request(
        prompt, fastgen.SamplingParams(n=samples, seed=1, max_new_tokens=4, ignore_eos=True)
    )
    run_all(engine, [request])
    assert engine.stats.prefill_tokens == length + samples - 1
    assert engine.stats.reused_tokens == (samples - 1) * (length - 1)
    assert_idle(engine)


def test_a_system_prompt_is_prefilled_once_for_requests_that_come_together(engine: Engine) -> None:
    rng = np.random.default_rng(5)
    system = random_prompt(rng, 96)
    tails = [random_prompt(rng, 7) for _ in range(6)]
    params = greedy(max_new_tokens=6, ignore_eos=True)
    requests = [engine.add_request(system + tail, params) for tail in tails]
    run_all(engine, requests)
    assert engine.stats.prefill_tokens == 96 + 6 * 7
    for tail, request in zip(tails, requests, strict=True):
        fresh = make_engine()
        single = fresh.add_request(system + tail, params)
        run_all(fresh, [single])
        assert new_tokens(single) == new_tokens(request)
    assert_idle(engine)


def test_a_finished_rows_text_is_found_again_with_what_was_drawn(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(6), 40)
    first = engine.add_request(prompt, greedy(max_new_tokens=60, ignore_eos=True))
    run_all(engine, [first])
    before = engine.stats.prefill_tokens
    dialogue = [*first.rows[0].token_ids, 11, 12, 13]  # 103 tokens, 99 cached: 3 full blocks
    second = engine.add_request(dialogue, greedy(max_new_tokens=5, ignore_eos=True))
    run_all(engine, [second])
    assert engine.stats.prefill_tokens - before == 103 - 96
    assert_idle(engine)


def test_a_prompt_repeats_in_a_pool_of_exactly_one_context() -> None:
    """The found, partly filled block and its copy do not both fit: it is computed again."""
    engine = make_engine(seats=1, max_seq_len=128)
    prompt = random_prompt(np.random.default_rng(12), 70)
    requests = []
    for _ in range(3):
        requests.append(engine.add_request(prompt, greedy(max_new_tokens=58, ignore_eos=True)))
        run_all(engine, requests)
    assert new_tokens(requests[0]) == new_tokens(requests[1]) == new_tokens(requests[2])
    assert engine.stats.prefill_tokens == 70 + 2 * (70 - 64)
    assert_idle(engine)


@pytest.mark.parametrize("length", [1, 2, 32, 33, 34, 64, 65])
def test_samples_of_nothing_end_without_a_token(length: int) -> None:
    """Also where all that has to be computed of a prompt fills blocks that are found."""
    engine = make_counting_engine()
    prompt = [index % 97 for index in range(length)]
    params = fastgen.SamplingParams(n=6, max_new_tokens=0, prompt_logprobs=0)
    request = engine.add_request(prompt, params)
    run_all(engine, [request])
    assert [row.finish_reason for row in request.rows] == ["length"] * 6
    assert new_tokens(request) == [[]] * 6
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == length
    assert_idle(engine)


def test_salts_keep_prefixes_apart(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(7), 64)
    for salt in ("a", "b", None):
        run_all(engine, [engine.add_request(prompt, greedy(max_new_tokens=1), cache_salt=salt)])
    assert engine.stats.prefill_tokens == 3 * 64
    run_all(engine, [engine.add_request(prompt, greedy(max_new_tokens=1), cache_salt="a")])
    assert engine.stats.prefill_tokens == 3 * 64 + 1


def test_prompt_logprobs_look_nothing_up_and_agree(engine: Engine) -> None:
    prompt = random_prompt(np.random.default_rng(8), 150)
    params = greedy(max_new_tokens=3, prompt_logprobs=2, ignore_eos=True)
    first, second = (engine.add_request(prompt, params) for _ in range(2))
    run_all(engine, [first, second])
    assert engine.stats.prefill_tokens == 300
    for request in (first, second):
        assert request.prompt_logprobs is not None
        assert len(request.prompt_logprobs) == 150
        assert request.prompt_logprobs[0] is None
        assert [entry.token_id for entry in request.prompt_logprobs[1:] if entry] == prompt[1:]
    assert_idle(engine)


def test_cancelling_a_row_changes_nobody_and_frees_its_blocks(engine: Engine) -> None:
    rng = np.random.default_rng(9)
    prompts = [random_prompt(rng, length) for length in (40, 9, 70)]
    params = fastgen.SamplingParams(seed=3, max_new_tokens=40, ignore_eos=True)
    undisturbed = [engine.add_request(prompt, params) for prompt in prompts]
    run_all(engine, undisturbed)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    engine.run(lambda: len(requests[1].rows[0].new_token_ids) >= 7)
    free = engine.num_free_blocks
    engine.cancel(requests[1])
    assert requests[1].done
    assert requests[1].rows[0].finish_reason == "cancelled"
    assert engine.num_free_blocks > free, "at once, since nobody was running a step"
    run_all(engine, requests)
    for before, after in zip(undisturbed[::2], requests[::2], strict=True):
        assert new_tokens(before) == new_tokens(after)
    assert (
        new_tokens(undisturbed[1])[0][: len(new_tokens(requests[1])[0])]
        == new_tokens(requests[1])[0]
    )
    assert_idle(engine)


def test_cancelling_the_row_others_wait_for_lets_them_go_on() -> None:
    """Rows with the same prompt wait for the first to compute it; it may never do so."""
    engine = make_engine(max_seq_len=1024)
    prompt = random_prompt(np.random.default_rng(10), 900)
    first, second = (
        engine.add_request(prompt, greedy(max_new_tokens=2, ignore_eos=True)) for _ in range(2)
    )
    engine.run(lambda: len(recorder_of(engine).batches) >= 2)
    assert second.admitted is None
    engine.cancel(first)
    run_all(engine, [second])
    assert len(second.rows[0].new_token_ids) == 2
    assert_idle(engine)


def test_deadlines_end_rows_that_wait_and_rows_that_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    for module in ("engine.engine", "engine.inbox"):
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(f"fastgen.{module}.time", clock)
    params = greedy(max_new_tokens=200, ignore_eos=True)
    deadline = deadline_in(5)
    running = [engine.add_request([index + 1], params, deadline=deadline) for index in range(4)]
    waiting = engine.add_request([9], params, deadline=deadline)
    patient = engine.add_request([10], greedy(max_new_tokens=3, ignore_eos=True))
    engine.run(lambda: len(running[0].rows[0].new_token_ids) == 7)
    now[0] += 5
    run_all(engine, [*running, waiting, patient])
    assert {request.rows[0].finish_reason for request in running} == {"timeout"}
    assert len(running[0].rows[0].new_token_ids) == 7
    assert waiting.rows[0].finish_reason == "timeout"
    assert waiting.rows[0].new_token_ids == []
    assert patient.rows[0].finish_reason == "length"
    assert_idle(engine)


def test_a_failing_step_fails_its_batch_and_the_next_request_works(engine: Engine) -> None:
    rng = np.random.default_rng(11)
    prompt = random_prompt(rng, 12)
    canary = engine.add_request(prompt, greedy(max_new_tokens=8))
    run_all(engine, [canary])

    def fail(batch: object) -> None:
        raise RuntimeError("injected")

    recorder_of(engine).before_step = fail
    broken = [engine.add_request(random_prompt(rng, 30), greedy()) for _ in range(6)]
    run_all(engine, broken, may_fail=True)
    assert all(isinstance(request.error, RuntimeError) for request in broken)
    assert all(row.error is request.error for request in broken for row in request.rows)
    assert {row.finish_reason for request in broken for row in request.rows} == {"error"}
    recorder_of(engine).before_step = lambda batch: None
    again = engine.add_request(prompt, greedy(max_new_tokens=8))
    run_all(engine, [again])
    assert new_tokens(again) == new_tokens(canary)
    assert_idle(engine)


def test_threads_drive_one_engine_and_a_paused_one_stalls_nobody() -> None:
    engine = make_engine(seats=8)
    params = fastgen.SamplingParams(seed=5, max_new_tokens=30, ignore_eos=True)
    prompts = [random_prompt(np.random.default_rng(20 + i), 5 + i) for i in range(8)]
    alone = []
    for prompt in prompts:
        alone.append(engine.add_request(prompt, params))
        run_all(engine, alone)
    paused = engine.add_request(prompts[0], params)
    engine.run(
        lambda: len(paused.rows[0].new_token_ids) >= 1
    )  # then its reader does something else
    found: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        request = engine.add_request(prompts[index], params)
        run_all(engine, [request])
        found[index] = new_tokens(request)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert not any(thread.is_alive() for thread in threads)
    assert [found[index] for index in range(8)] == [new_tokens(request)[0:1] for request in alone]
    run_all(engine, [paused])
    assert_idle(engine)


def test_close_ends_everything_and_refuses_more(engine: Engine) -> None:
    request = engine.add_request([1, 2, 3], greedy(max_new_tokens=50))
    engine.run(lambda: len(request.rows[0].new_token_ids) >= 2)
    engine.close()
    engine.close()
    assert request.rows[0].finish_reason == "cancelled"
    with pytest.raises(fastgen.EngineError, match="closed"):
        engine.add_request([1], greedy())


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([1, 4096], ValueError, "4096"),
        ([-1], ValueError, "-1"),
        ([2**63], ValueError, "outside the vocabulary"),
        ([1.0], TypeError, "1.0"),
        ([True], TypeError, "True"),
        (["a"], TypeError, "'a'"),
        ([[1]], TypeError, "integer"),
        ([1] * 256, ValueError, "256 tokens"),
    ],
)
def test_wrong_prompts_are_refused_and_leave_the_engine_alone(
    engine: Engine, token_ids: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.add_request(token_ids, greedy(max_new_tokens=1))
    assert_idle(engine)
    ok = engine.add_request([1] * 255, greedy(max_new_tokens=10, ignore_eos=True))
    run_all(engine, [ok])
    assert len(ok.rows[0].token_ids) == 256, "the context is the end"
    assert ok.rows[0].finish_reason == "length"


def test_waiting_for_what_cannot_come_is_an_error(engine: Engine) -> None:
    with pytest.raises(fastgen.EngineError, match="no row"):
        engine.run(lambda: False)


def test_timings_are_in_order(engine: Engine) -> None:
    start = time.monotonic()
    request = engine.add_request([3, 4], greedy(max_new_tokens=4, ignore_eos=True))
    run_all(engine, [request])
    timings = request.timings
    assert timings.admitted is not None
    assert timings.first_token is not None
    assert 0 <= timings.admitted <= timings.first_token <= timings.finished
    assert timings.finished <= time.monotonic() - start
