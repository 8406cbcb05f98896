"""The C++ sampler by itself: ids, bindings, threads, instruction sets; test_sampler.py has more.

Imports no torch, so that it can also run under sanitizers (test_sanitizers.py).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import processes
from cpu_decoders import INSTRUCTION_SETS, instruction_set
from fastgen import SamplingParams
from fastgen.native import native
from fastgen.sampling.native_sampler import NativeSampler
from sampling_harness import (
    Rows,
    adversarial_logits,
    draw_each,
    make_native,
    random_logits,
    random_params,
)
from waits import WITHIN

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")


def drawn_ids(threads: int) -> list[list[int]]:
    """Of many random rows."""
    found: list[list[int]] = []
    for vocab_size in (5, 63, 64, 700, 5000):
        rng = np.random.default_rng(vocab_size)
        for logits in (random_logits(rng, 24, vocab_size), adversarial_logits(rng, vocab_size)):
            params = [random_params(rng, vocab_size) for _ in logits]
            sampler = make_native(len(logits), vocab_size, frozenset({1}), threads)
            for seat, options in enumerate(params):
                sampler.bind(seat, options, rng.integers(0, vocab_size, 20).tolist())
            seats = np.arange(len(logits), dtype=np.int32)
            for _ in range(4):
                draws = sampler.draw(logits, seats, [-1] * len(logits))
                found.append([draw.token_id if draw.ok else -1 for draw in draws])
    return found


@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 500])
def test_draws_the_defined_ids(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for _ in range(15):
        rows = Rows(make_native, 6, max(4, vocab_size))
        for seat in range(6):
            rows.bind_random(rng, seat)
        for _ in range(4):
            for seat in range(6):
                rows.interfere(rng, seat)
            rows.draw_and_compare(rng, random_logits(rng, 6, max(4, vocab_size)))


def test_one_thread_draws_what_many_draw() -> None:
    assert drawn_ids(1) == drawn_ids(7)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_draws_the_same(name: str) -> None:
    wanted = drawn_ids(2)
    with instruction_set(name):
        assert drawn_ids(2) == wanted


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_ISA", "sse17")
    with pytest.raises(ValueError, match="FASTGEN_ISA"):
        make_native(1, 5, frozenset())


def test_several_python_threads_draw_at_once() -> None:
    """Each on a sampler of its own; they share the pool; who finds it busy goes on alone."""
    wanted = drawn_ids(2)
    found: list[list[list[int]]] = []

    def draw() -> None:
        found.append(drawn_ids(3))

    threads = [threading.Thread(target=draw, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert found == [wanted] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_draws_with_threads_of_its_own() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
    params = [SamplingParams(seed=seed, typical_p=0.9) for seed in range(8)]
    wanted = draw_each(make_native, logits, params)  # has made the pool
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "helpers")]!r}
import numpy as np
from fastgen import SamplingParams
from sampling_harness import draw_each, make_native
logits = np.random.default_rng(0).normal(size=(8, 3000)).astype(np.float32)
params = [SamplingParams(seed=seed, typical_p=0.9) for seed in range(8)]
before = draw_each(make_native, logits, params)
pid = os.fork()
same = draw_each(make_native, logits, params) == before
if pid == 0:
    os._exit(0 if same else 3)
print(before, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    process = processes.run([sys.executable, "-c", code])
    assert process.stdout.strip() == f"{wanted} 0", process.stderr


def test_the_rows_end_is_respected() -> None:
    """A row of max_seq_len tokens is full: it is drawn for, but nothing is counted any more."""
    sampler = NativeSampler(1, 9, [], max_seq_len=4, num_threads=1)
    params = SamplingParams(temperature=0, no_repeat_ngram_size=1)
    with pytest.raises(ValueError, match="longer than max_tokens"):
        sampler.bind(0, params, [1] * 5)
    sampler.bind(0, params, [8, 7, 6])
    logits, seats = np.arange(9, dtype=np.float32)[None], np.zeros(1, np.int32)
    assert [sampler.draw(logits, seats, [-1])[0].token_id for _ in range(3)] == [5, 4, 4]
    with pytest.raises(ValueError, match="full"):
        sampler.observe(0, 1)


GOOD = (
    np.zeros((2, 9), np.float32), np.array([0, 1], np.int32), np.array([-1, -1], np.int32), 0
)  # fmt: skip
WRONG = [
    (0, np.zeros((2, 8), np.float32), "vocab_size"),
    (0, np.zeros((3, 9), np.float32), "vocab_size"),
    (0, np.zeros(9, np.float32), "vocab_size"),
    (0, np.zeros((2, 9)), "incompatible"),
    (0, np.zeros((2, 18), np.float32)[:, ::2], "incompatible"),
    (1, np.array([0, 2], np.int32), "seat"),
    (1, np.array([0, -1], np.int32), "seat"),
    (1, np.array([0, 1]), "incompatible"),
    (2, np.array([-1], np.int32), "drafts"),
    (3, -1, "draw"),
]


@pytest.mark.parametrize(("at", "value", "message"), WRONG)
def test_wrong_arrays_are_refused(at: int, value: Any, message: str) -> None:
    sampler = native.Sampler(2, 9, 20, 1)
    options = {**native_options(), "temperature": 0.0}
    for seat in range(2):
        sampler.bind(seat, [1], options)
    arguments = list(GOOD)
    arguments[at] = value
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        sampler.draw(*arguments)
    assert sampler.draw(*GOOD)[0].tolist() == [0, 0]


def test_a_seats_draws_stand_together() -> None:
    sampler = native.Sampler(2, 9, 20, 1)
    arrays = np.zeros((3, 9), np.float32), np.array([0, 1, 0], np.int32), np.full(3, -1, np.int32)
    with pytest.raises(ValueError, match="together"):
        sampler.draw(*arrays, 0)


@pytest.mark.parametrize(
    "name", ["suppress_tokens", "begin_suppress_tokens", "allowed_token_ids", "ending_ids"]
)
@pytest.mark.parametrize("token_id", [-1, 9, 2**31, 2**40, -(2**63)])
def test_ids_outside_the_vocabulary_are_refused(name: str, token_id: int) -> None:
    """They would write into a neighbour's memory. The engine refuses them before."""
    sampler = native.Sampler(2, 9, 20, 1)
    with pytest.raises(ValueError, match=f"{name}: token id {token_id} is outside"):
        sampler.bind(0, [1], {**native_options(), name: [2, token_id]})
    for other, value in (("bad_words", [[token_id, 1]]), ("logit_bias", [(token_id, 1.0)])):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            sampler.bind(0, [1], {**native_options(), other: value})
    calls: tuple[Callable[[], Any], ...] = (
        lambda: sampler.bind(0, [token_id], native_options()),
        lambda: sampler.observe(0, token_id),
    )
    for call in calls:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            call()


def test_every_option_is_handed_over_by_its_name() -> None:
    """None can be forgotten on the way to C++."""
    assert set(native.Sampler.options) == native_options().keys()
    sampler = native.Sampler(1, 9, 20, 1)
    for name in native.Sampler.options:
        options = native_options()
        del options[name]
        with pytest.raises(KeyError, match=f"option {name} is missing"):
            sampler.bind(0, [1], options)
    with pytest.raises(KeyError, match="option top_z is unknown"):
        sampler.bind(0, [1], {**native_options(), "top_z": 1})


@pytest.mark.parametrize("seat", [-1, 2, 2**31 - 1])
def test_seats_that_are_not_there_are_refused(seat: int) -> None:
    sampler = native.Sampler(2, 9, 20, 1)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: sampler.bind(seat, [1], native_options()),
        lambda: sampler.observe(seat, 1),
        lambda: sampler.set_mask(seat, None),
    )
    for call in calls:
        with pytest.raises(IndexError, match="seat"):
            call()
    with pytest.raises(ValueError, match="vocab_size"):
        sampler.set_mask(0, np.ones(8, bool))
    for sizes in ((0, 9, 20, 1), (2, 0, 20, 1), (2, 9, 0, 1), (2, 9, 20, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            native.Sampler(*sizes)


def native_options() -> dict[str, Any]:
    """What NativeSampler.bind gives for default options."""
    given: dict[str, Any] = {}

    class Catch:
        def bind(self, seat: int, prompt: Any, options: dict[str, Any]) -> None:
            given.update(options)

    sampler = make_native(1, 9, frozenset())
    sampler.native = Catch()
    sampler.bind(0, SamplingParams(), [1])
    return given
