"""Draws: the uniform, and samplers that must return the ids that the definition returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fastgen import SamplingParams
from fastgen.native import native
from fastgen.sampling.definition import token_logprobs
from fastgen.sampling.filters import kept_weights
from fastgen.sampling.philox import philox4x32, sample_seed, uniforms, words_to_uniform
from fastgen.sampling.torch_sampler import TorchSampler, _pick
from sampling_harness import (
    EOS,
    SAMPLERS,
    DefinedRow,
    Rows,
    adversarial_logits,
    draw_each,
    random_logits,
)

# Random123's published known-answer vectors for philox4x32-10: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
@pytest.mark.parametrize("kind", ["int", "numpy", "torch"])
def test_philox_gives_random123s_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...], kind: str
) -> None:
    wrap: dict[str, Callable[[int], Any]] = {
        "int": int,
        "numpy": lambda w: np.array([w, w]),
        "torch": lambda w: torch.tensor([w, w]),
    }
    words = philox4x32(tuple(map(wrap[kind], counter)), tuple(map(wrap[kind], key)))
    for word, wanted in zip(words, expected, strict=True):
        assert np.all(np.asarray(word) == wanted)


def test_uniforms_are_the_same_in_every_implementation() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**63), 2**63 - 1, 500)
    positions = rng.integers(0, 2**20, 500)
    unsigned = seeds.view(np.uint64).tolist()
    by_hand = []
    for seed, position in zip(unsigned, positions.tolist(), strict=True):
        high, low, _, _ = philox4x32((position, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
        by_hand.append(words_to_uniform(high, low) * 2.0**-53)
    assert uniforms(seeds, positions).tolist() == by_hand
    if native is not None:
        assert native.uniforms(seeds, positions).tolist() == by_hand
    assert 0 <= min(by_hand) < 0.02 < 0.98 < max(by_hand) < 1


def test_the_torch_uniform_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it runs on a device other than the CPU."""
    rng = np.random.default_rng(1)
    seeds, positions = rng.integers(-(2**63), 2**63 - 1, 50), rng.integers(0, 2**33, 50)
    sampler = TorchSampler(1, 5, EOS, torch.device("cpu"))
    sampler.device = torch.device("meta")  # any other type: takes the tensor path
    monkeypatch.setattr(sampler, "_tensor", lambda values: torch.from_numpy(values.copy()))
    assert sampler._uniforms(seeds, positions)[:, 0].tolist() == uniforms(seeds, positions).tolist()


def test_a_uniform_on_an_edge_draws_what_is_behind_it() -> None:
    weights = torch.tensor([[0.0, 0, 1, 1, 0]] * 3).double()
    uniform = torch.tensor([[0.0], [0.5], [1.0]]).double()  # 1: as good as one that is rounded up
    assert _pick(weights, uniform).tolist() == [[2], [3], [3]]


def test_sample_seeds_differ_and_sample_0_has_the_requests_own() -> None:
    seeds = [sample_seed(12345, index) for index in range(1000)]
    assert seeds[0] == 12345
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.fixture(params=SAMPLERS)
def make(request: pytest.FixtureRequest) -> Any:
    """Makes a sampler of (num_seats, vocab_size, eos_ids)."""
    return SAMPLERS[request.param]


@pytest.mark.parametrize(
    ("vocab_size", "trials"), [(5, 50), (13, 50), (64, 60), (301, 80), (1500, 10), (50257, 3)]
)
def test_every_option_draws_the_defined_ids(make: Any, vocab_size: int, trials: int) -> None:
    """2,024 sets of options and more, eight rows at once, five tokens long."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(trials):
        rows = Rows(make, 8, vocab_size)
        for seat in range(8):
            rows.bind_random(rng, seat)
        for _ in range(5):
            for seat in range(8):
                rows.interfere(rng, seat)
            logits = random_logits(rng, 8, vocab_size)
            if rng.random() < 0.1:
                logits[rng.integers(8), rng.integers(vocab_size)] = rng.choice([np.nan, np.inf])
            rows.draw_and_compare(rng, logits)


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0},
    *({"top_n_sigma": n} for n in (1e-9, 0.5, 1.0, 2.0, 1e6)),
    *({"top_n_sigma": 1.5, "temperature": t} for t in (1e-6, 0.3, 1e6)),
    {"top_n_sigma": 1.0, "top_h": 0.9, "top_k": 3},
    *({"top_h": h} for h in (0.01, 0.5, 1.0)),
    *({"top_k": k} for k in (1, 3, 1000, 1500)),
    *({"top_p": p} for p in (0.01, 0.5, 0.9999)),
    *({"min_p": p} for p in (1e-9, 0.5, 1.0)),
    *({"typical_p": p} for p in (0.01, 0.5, 0.9999)),
    *({"epsilon_cutoff": p} for p in (1e-9, 1e-3, 0.9)),
    *({"eta_cutoff": p} for p in (1e-9, 1e-3, 0.9)),
]


@pytest.mark.parametrize("vocab_size", [7, 211, 50257])
def test_adversarial_logits_draw_the_defined_ids(make: Any, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = adversarial_logits(rng, vocab_size)
    few = FILTERS if vocab_size < 1000 else FILTERS[::2]
    for options in [*few, *({"top_k": 5} | other for other in few), {"top_h": 0.9, "top_p": 0.5}]:
        params = [SamplingParams(seed=seed, **options) for seed in range(len(logits))]
        wanted = [
            DefinedRow(one, [1], EOS).draw(row) for one, row in zip(params, logits, strict=True)
        ]
        assert draw_each(make, logits, params) == wanted, options


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}, {"typical_p": 0.5}),
        *({"top_h": 0.5}, {"suppress_tokens": [7]}, {"allowed_token_ids": [1, 2]}),
    ],
)
def test_bad_logits_end_only_their_row(make: Any, bad: float, options: dict[str, Any]) -> None:
    """Even where what is bad could not have been drawn."""
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    params = [SamplingParams(seed=1, **options)] * 3
    whole = draw_each(make, logits, params)
    logits[1, 7] = bad
    assert draw_each(make, logits, params) == [whole[0], (0, False), whole[2]]
    assert DefinedRow(params[1], [1], EOS).draw(logits[1]) == (0, False)


def test_rows_with_nothing_left_end_alone(make: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    logits[0] = -np.inf
    logits[1] = 3e38
    params = [
        SamplingParams(allowed_token_ids=[4], seed=1),  # not even this rescues a row of -inf
        SamplingParams(temperature=0.1, seed=1),  # infinite when divided
        SamplingParams(suppress_tokens=list(range(9)), seed=1),
        SamplingParams(suppress_tokens=list(range(9)), temperature=0),
        SamplingParams(suppress_tokens=list(range(8)), top_k=3, top_h=0.5, seed=1),
        SamplingParams(bad_words=[[4]], allowed_token_ids=[4], seed=1),  # then any of the allowed
    ]
    wanted = [(0, False)] * 4 + [(8, True), (4, True)]
    assert draw_each(make, logits, params) == wanted
    rows = [DefinedRow(one, [1], EOS) for one in params]
    assert [row.draw(own) for row, own in zip(rows, logits, strict=True)] == wanted


def test_a_mask_that_allows_nothing_ends_its_row(make: Any) -> None:
    rows = Rows(make, 3, 9)
    for seat in range(3):
        rows.bind(seat, SamplingParams(allowed_token_ids=[2, 5], seed=seat), [1])
        row = rows.defined[seat]
        row.mask = np.isin(np.arange(9), [[2], [3], [5, 3]][seat])
        rows.sampler.set_mask(seat, row.mask)
    logits = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    draws = rows.sampler.draw(logits, np.arange(3, dtype=np.int32), [-1] * 3)
    assert [(one.token_id, one.ok) for one in draws] == [(2, True), (0, False), (5, True)]


def test_greedy_takes_the_lowest_of_equals(make: Any) -> None:
    logits = np.array([[0, 3, 1, 3, 3]], np.float32)
    greedy = SamplingParams(temperature=0)
    assert draw_each(make, logits, [greedy]) == [(1, True)]
    assert DefinedRow(greedy, [1], EOS).draw(logits[0]) == (1, True)


def test_drafts_draw_what_one_by_one_draws(make: Any) -> None:
    """Whatever the options count, and nothing behind a wrong draft leaves a trace."""
    rng = np.random.default_rng(8)
    for _ in range(60):
        rows = Rows(make, 4, 30)
        for seat in range(4):
            rows.bind_random(rng, seat)
        logits = random_logits(rng, 20, 30)
        num_drafts = rng.integers(0, 5, 4)
        seats = np.repeat(np.arange(4, dtype=np.int32), num_drafts + 1)
        logits, drafts, wanted = logits[: len(seats)], [], []
        for seat in range(4):
            row, going = rows.defined[seat], True
            for at in np.flatnonzero(seats == seat):
                last = at + 1 == len(seats) or seats[at + 1] != seat
                drawn = row.draw(logits[at]) if going else (int(rng.integers(30)), False)
                wrong = rng.random() < 0.2
                drafts.append(-1 if last else (drawn[0] + wrong) % 30)
                wanted += [(seat, *drawn)] if going else []
                going = going and drawn[1] and not wrong
        draws = rows.sampler.draw(logits, seats, drafts)
        assert [(one.seat, one.token_id, one.ok) for one in draws] == wanted
        if all(one.ok for one in draws):
            rows.draw_and_compare(rng, random_logits(rng, 4, 30))


def test_a_bad_draw_among_drafts_is_the_seats_last(make: Any) -> None:
    logits = np.zeros((4, 5), np.float32)
    logits[np.arange(4), [2, 1, 3, 3]] = 9
    logits[1, 4] = np.nan
    sampler = make(2, 5, EOS)
    for seat in range(2):
        sampler.bind(seat, SamplingParams(temperature=0), [1])
    draws = sampler.draw(logits, np.array([0, 0, 0, 1], np.int32), [2, 0, -1, -1])
    assert [(one.seat, one.token_id, one.ok) for one in draws] == [
        *((0, 2, True), (0, 0, False), (1, 3, True))
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_n_sigma": 1.0},
        {"top_h": 0.7},
        {"typical_p": 0.6},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_frequencies_match_exact_probabilities(make: Any, options: dict[str, Any]) -> None:
    """Chi-square over 10,000 uniforms; with fixed seeds it either always passes or never."""
    logits = np.random.default_rng(5).normal(0, 1.5, 40).astype(np.float32)
    count, seats = 10_000, 2_000
    rows = np.tile(logits, (seats, 1))
    drawn: list[int] = []
    for start in range(0, count, seats):
        params = [SamplingParams(seed=start + seat, **options) for seat in range(seats)]
        drawn += [token_id for token_id, _ in draw_each(make, rows, params)]
    weights = kept_weights(logits, SamplingParams(**options))
    observed = np.bincount(drawn, minlength=40)
    assert (observed[weights == 0] == 0).all(), "a token that the filters removed was drawn"
    expected = weights[weights > 0] / weights.sum() * count
    assert chisquare(observed[weights > 0], expected).pvalue > 1e-3


def test_logprobs_are_log_softmax_with_the_best_first() -> None:
    logits = np.random.default_rng(6).normal(0, 2, (4, 60)).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(1).numpy()
    for scored, row, target in zip(
        token_logprobs(logits, [3, 1, 4, 1], 5), expected, [3, 1, 4, 1], strict=True
    ):
        assert scored.token_id == target
        assert scored.logprob == pytest.approx(row[target], abs=1e-9)
        assert [token_id for token_id, _ in scored.top] == np.argsort(-row)[:5].tolist()
        assert [lp for _, lp in scored.top] == pytest.approx(np.sort(row)[::-1][:5], abs=1e-9)


@pytest.mark.parametrize("vocab_size", [5, 60, 3000])
def test_draws_bring_logprobs_of_the_raw_logits(make: Any, vocab_size: int) -> None:
    """Best first, of equals the lowest id; each row as many as it wants."""
    rng = np.random.default_rng(vocab_size)
    logits = np.round(rng.normal(0, 2, (8, vocab_size))).astype(np.float32)
    logits[3] = 1
    sampler = make(8, vocab_size, EOS)
    wanted = [None, 0, 1, 5, 40, None, vocab_size + 3, 5]
    for seat, count in enumerate(wanted):
        options: dict[str, Any] = {
            "logprobs": count,
            "seed": seat,
            "suppress_tokens": [4],
            "temperature": 0.5,
        }
        sampler.bind(seat, SamplingParams(**options), [1])
    draws = sampler.draw(logits, np.arange(8, dtype=np.int32), [-1] * 8)
    for drawn, count, row in zip(draws, wanted, logits, strict=True):
        if count is None:
            assert drawn.logprobs is None
            continue
        logprobs = torch.from_numpy(row).double().log_softmax(0).tolist()
        best = np.argsort(-row, kind="stable")[:count].tolist()
        assert drawn.logprobs.token_id == drawn.token_id
        assert drawn.logprobs.logprob == pytest.approx(logprobs[drawn.token_id], abs=1e-12)
        assert [token_id for token_id, _ in drawn.logprobs.top] == best
        assert [value for _, value in drawn.logprobs.top] == pytest.approx(
            [logprobs[token_id] for token_id in best], abs=1e-12
        )
