"""The StepBatch contract on each decoder: caching, chunks, feedback, drafts, masks, growth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from decoder_names import DECODERS, INTERPRETED
from fastgen.decoders.interface import Decoder
from fastgen.sampling.definition import draw
from fastgen.sampling.processors import RowState
from stepping import Rows, all_logits, to_numpy
from tolerances import TOLERANCES

Folder = Callable[[str], Path]


@pytest.fixture(params=DECODERS)
def decoder_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def decoder(variant: Folder, decoder_name: str) -> Any:
    with load_small(variant, decoder_name, max_batch_size=8) as model:
        yield model.engine.decoder


def load_small(variant: Folder, decoder_name: str, **options: Any) -> fastgen.Generator:
    """A model of 96 positions; Triton's interpreter is slow enough with one layer."""
    folder = variant("one_layer" if INTERPRETED else "plain")
    return fastgen.load(folder, decoder=decoder_name, dtype="float32", **options)


def random_rows(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 211, length).tolist() for length in lengths]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 20 * TOLERANCES["float32"]["slack"] * np.abs(b).max()


@pytest.mark.parametrize("chunks", [[1], [2, 5, 3], [31, 1], [32], [33, 7]])
def test_cached_is_uncached_is_chunked(decoder: Decoder, chunks: list[int]) -> None:
    length = 67 if INTERPRETED else 90  # three blocks
    [row] = random_rows(1, (length,))
    whole = all_logits(decoder, [row], [length])
    assert_close(all_logits(decoder, [row], chunks), whole)
    ends = (1, 32, 33, length)
    without_cache = [all_logits(decoder, [row[:end]], [length])[0][-1] for end in ends]
    assert_close(without_cache, [whole[0][end - 1] for end in ends])


def test_a_row_alone_is_the_row_among_others(decoder: Decoder) -> None:
    rows = random_rows(2, (3, 17, 40, 64, 8, 21))
    together = all_logits(decoder, rows, [4, 9])
    alone = [all_logits(decoder, [row], [96], seed=7)[0] for row in rows]
    assert_close(together, alone)


def test_repeated_and_scattered_logits_positions(decoder: Decoder) -> None:
    rows = Rows(decoder, 2)
    batch = rows.batch(random_rows(3, (5, 7)))
    every = to_numpy(decoder.forward(batch))
    wanted = np.array([11, 0, 0, 4, 11], np.int32)
    picked = replace(batch, logits_at=wanted, seats=np.full(5, -1, np.int32))
    some = to_numpy(decoder.forward(picked))
    assert_close([some], [every[wanted]])


PROMPT = [1] * 5


def bound(decoder: Decoder, seats: int, **options: Any) -> list[fastgen.SamplingParams]:
    params = [fastgen.SamplingParams(seed=40 + seat, **options) for seat in range(seats)]
    for seat in range(seats):
        decoder.bind(seat, params[seat], PROMPT)
    return params


def defined(logits: np.ndarray, params: fastgen.SamplingParams, *observed: int) -> int:
    """What the definition draws for a row that was bound."""
    row = np.array([*PROMPT, *observed])
    return draw(logits, params, RowState(row, len(PROMPT)))[0]


def test_feedback_ids_stand_for_the_token_a_seat_drew_last(decoder: Decoder) -> None:
    prompts = random_rows(4, (5, 5))
    bound(decoder, 2, top_k=20)
    rows = Rows(decoder, 2)
    first = [d.token_id for d in decoder.step(rows.batch(prompts, seats=[0, 1])).wait()]
    second = [d.token_id for d in decoder.step(rows.batch([[-1], [-2]], seats=[0, 1])).wait()]
    bound(decoder, 2, top_k=20)
    again = Rows(decoder, 2)
    assert [d.token_id for d in decoder.step(again.batch(prompts, seats=[0, 1])).wait()] == first
    explicit = again.batch([[first[0]], [first[1]]], seats=[0, 1])
    assert [d.token_id for d in decoder.step(explicit).wait()] == second


def test_one_step_draws_for_some_rows_and_brings_logits_of_others(decoder: Decoder) -> None:
    prompts = random_rows(5, (5, 6, 7))
    params = bound(decoder, 1, top_p=0.9, repetition_penalty=9.0, logit_bias={1: 20.0})
    rows = Rows(decoder, 3)
    batch = rows.batch(prompts, seats=[-1, 0, -1])
    every = to_numpy(decoder.forward(batch))
    step = decoder.step(batch)
    [drawn] = step.wait()
    assert drawn.seat == 0
    assert drawn.token_id == defined(every[1], params[0])
    assert np.array_equal(step.logits, every[[0, 2]])


@pytest.mark.parametrize("num_right", [0, 1, 3, 4])
def test_drafts_are_kept_up_to_the_first_that_differs(decoder: Decoder, num_right: int) -> None:
    """Checking drafts gives the tokens that plain decoding gives, whatever counts them."""
    [prompt] = random_rows(6, (5,))
    options = {"temperature": 0.8, "frequency_penalty": 2.0, "min_new_tokens": 3}
    bound(decoder, 1, **options)
    rows = Rows(decoder, 1)
    plain = [decoder.step(rows.batch([prompt], seats=[0])).wait()[0].token_id]
    for _ in range(5):
        plain.append(decoder.step(rows.batch([[plain[-1]]], seats=[0])).wait()[0].token_id)
    bound(decoder, 1, **options)
    checked = Rows(decoder, 1)
    decoder.step(checked.batch([prompt], seats=[0])).wait()
    drafts = [*plain[1 : 1 + num_right], *[(plain[1 + num_right] + 1) % 211] * (4 - num_right)]
    batch = checked.batch([[plain[0], *drafts]])
    draws = decoder.step(replace(batch, seats=np.zeros(5, np.int32))).wait()
    assert [d.token_id for d in draws] == plain[1 : 2 + num_right]
    # the seat goes on from what was kept: its next uniform is that of the next position
    checked.cache_lens[0] = 5 + 1 + num_right
    if num_right < 4:
        follow = decoder.step(checked.batch([[plain[1 + num_right]]], seats=[0])).wait()
        assert follow[0].token_id == plain[2 + num_right]


def test_observed_tokens_count_and_move_the_uniform_on(decoder: Decoder) -> None:
    [prompt] = random_rows(7, (5,))
    [params] = bound(decoder, 1, presence_penalty=-20.0)
    rows = Rows(decoder, 1)
    decoder.observe(0, 17)  # the row's sixth token, chosen by the host
    batch = rows.batch([[*prompt, -1]], seats=[0])
    logits = to_numpy(decoder.forward(batch))
    assert decoder.step(batch).wait()[0].token_id == defined(logits[0], params, 17)


def test_masks_allow_what_they_allow_until_taken_back(decoder: Decoder) -> None:
    prompts = random_rows(8, (5, 5))
    bound(decoder, 2)
    allowed = np.zeros(211, bool)
    allowed[[3, 99]] = True
    decoder.set_mask(0, allowed)
    rows = Rows(decoder, 2)
    batch = rows.batch(prompts, seats=[0, 1])
    free = draw_again(decoder, batch, masked=False)
    masked = draw_again(decoder, batch, masked=True, allowed=allowed)
    assert masked[0] in (3, 99)
    assert masked[1] == free[1]


def draw_again(decoder: Decoder, batch: Any, *, masked: bool, allowed: Any = None) -> list[int]:
    bound(decoder, 2)
    decoder.set_mask(0, allowed if masked else None)
    return [d.token_id for d in decoder.step(batch).wait()]


def test_copied_blocks_hold_the_same_keys_and_values(decoder: Decoder) -> None:
    [row] = random_rows(9, (40,))
    rows = Rows(decoder, 2)
    decoder.forward(rows.batch([row, []]))
    decoder.copy_blocks(
        list(zip(rows.tables[0][:2].tolist(), rows.tables[1][:2].tolist(), strict=True))
    )
    rows.cache_lens[1] = 40
    last = to_numpy(decoder.forward(rows.batch([[7], [7]])))
    assert_close([last[0]], [last[1]])


def test_reserve_grows_and_keeps_what_is_cached(variant: Folder, decoder_name: str) -> None:
    with load_small(variant, decoder_name, max_batch_size=2) as model:
        decoder = model.engine.decoder
        [row] = random_rows(10, (50,))
        rows = Rows(decoder, 1)
        decoder.forward(rows.batch([row[:40]]))
        before = decoder.memory().kv_cache
        decoder.reserve(decoder.limits.num_blocks + 9, 5)
        assert decoder.limits.num_seats == 5
        assert decoder.memory().kv_cache > before
        tail = to_numpy(decoder.forward(rows.batch([row[40:]])))
        assert_close([tail], [all_logits(decoder, [row], [96])[0][40:]])
        bound(decoder, 5)
        decoder.observe(4, 3)
        assert (
            len(decoder.step(Rows(decoder, 5).batch([[1]] * 5, seats=[0, 1, 2, 3, 4])).wait()) == 5
        )


def test_batches_over_the_limits_are_refused(decoder: Decoder) -> None:
    rows = Rows(decoder, 8)
    with pytest.raises(AssertionError, match="budget"):
        decoder.forward(rows.batch(random_rows(11, (96,) * 8)))
