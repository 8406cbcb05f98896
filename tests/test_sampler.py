"""The sampler's definition: the coin, the filters, and two implementations that must agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fastgen import SamplingParams
from fastgen.decoders.torch_sampler import TorchSampler
from fastgen.native import native
from fastgen.philox import coins, philox4x32, sample_seed, words_to_coin
from fastgen.sampler import draw, kept_weights, token_logprobs

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
    counter: tuple, key: tuple, expected: tuple, kind: str
) -> None:
    wrap = {
        "int": int,
        "numpy": lambda w: np.array([w, w]),
        "torch": lambda w: torch.tensor([w, w]),
    }
    words = philox4x32(tuple(map(wrap[kind], counter)), tuple(map(wrap[kind], key)))
    for word, wanted in zip(words, expected, strict=True):
        assert np.all(np.asarray(word) == wanted)


def test_coins_are_the_same_in_every_implementation() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**63), 2**63 - 1, 500)
    positions = rng.integers(0, 2**20, 500)
    unsigned = seeds.view(np.uint64).tolist()
    by_hand = []
    for seed, position in zip(unsigned, positions.tolist(), strict=True):
        high, low, _, _ = philox4x32((position, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
        by_hand.append(words_to_coin(high, low) * 2.0**-53)
    assert coins(seeds, positions).tolist() == by_hand
    if native is not None:
        assert native.coins(seeds, positions).tolist() == by_hand
    assert 0 <= min(by_hand) < 0.02 < 0.98 < max(by_hand) < 1


def test_the_torch_coin_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it runs on a device other than the CPU."""
    rng = np.random.default_rng(1)
    seeds, positions = rng.integers(-(2**63), 2**63 - 1, 50), rng.integers(0, 2**33, 50)
    sampler = TorchSampler(1, torch.device("cpu"))
    sampler.device = torch.device("meta")  # any other type: takes the tensor path
    monkeypatch.setattr(sampler, "_tensor", lambda values: torch.from_numpy(values.copy()))
    assert sampler._coins(seeds, positions)[:, 0].tolist() == coins(seeds, positions).tolist()


def test_sample_seeds_differ_and_sample_0_has_the_requests_own() -> None:
    seeds = [sample_seed(12345, index) for index in range(1000)]
    assert seeds[0] == 12345
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)


def draw_with_torch(logits: np.ndarray, params: list[SamplingParams], position: int) -> list[int]:
    sampler = TorchSampler(len(params), torch.device("cpu"))
    for seat, options in enumerate(params):
        sampler.bind(seat, options, position)
    seats = np.arange(len(params), dtype=np.int32)
    draws = sampler.draw(torch.from_numpy(logits), seats, [-1] * len(params))
    assert all(drawn.ok for drawn in draws)
    return [drawn.token_id for drawn in draws]


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0, 0.3, 1.0, 2.5])),
        top_k=int(rng.choice([0, 0, 1, 5, 50, 10**6])),
        top_p=float(rng.choice([1.0, 1.0, 0.1, 0.5, 0.95, 0.9999])),
        seed=int(rng.integers(0, 2**63)),
    )


def adversarial_rows(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    rows = [
        rng.normal(0, 3, vocab_size),
        rng.normal(0, 0.01, vocab_size),
        np.zeros(vocab_size),  # all equal
        np.where(np.arange(vocab_size) == vocab_size // 2, 1.0, -np.inf),  # one finite
        rng.integers(0, 4, vocab_size),  # ties everywhere
        rng.normal(0, 1e-40, vocab_size),  # subnormal gaps
        np.where(rng.random(vocab_size) < 0.5, -np.inf, rng.normal(0, 2, vocab_size)),
        rng.normal(0, 1000, vocab_size),
    ]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("vocab_size", [7, 211, 5000])
def test_torch_draws_what_the_definition_draws(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for trial in range(60):
        logits = adversarial_rows(rng, vocab_size)
        params = [random_params(rng) for _ in logits]
        if trial % 3 == 0:  # every row with top-k: the path that looks at candidates only
            params = [
                SamplingParams(temperature=0.9, top_k=int(k), top_p=float(p), seed=int(k))
                for k, p in zip(rng.integers(1, 60, 8), rng.uniform(1e-3, 1, 8), strict=True)
            ]
        expected = [draw(row, p, trial)[0] for row, p in zip(logits, params, strict=True)]
        assert draw_with_torch(logits, params, trial) == expected, (trial, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}])
def test_bad_logits_end_only_their_row(bad: float, options: dict[str, float]) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    params = [SamplingParams(seed=1, **options)] * 3
    expected = draw_with_torch(logits, params, 4)
    logits[1, 7] = bad
    sampler = TorchSampler(3, torch.device("cpu"))
    for seat in range(3):
        sampler.bind(seat, params[seat], 4)
    draws = sampler.draw(torch.from_numpy(logits), np.arange(3, dtype=np.int32), [-1] * 3)
    assert [drawn.ok for drawn in draws] == [True, False, True]
    assert [draws[0].token_id, draws[2].token_id] == [expected[0], expected[2]]
    assert draw(logits[1], params[1], 4) == (0, False)
    assert draw(np.full(5, -np.inf, np.float32), params[1], 4) == (0, False)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([[0, 3, 1, 3, 3]], np.float32)
    greedy = SamplingParams(temperature=0)
    assert draw_with_torch(logits, [greedy], 0) == [1]
    assert draw(logits[0], greedy, 0) == (1, True)


def test_kept_sets_equal_transformers() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        logits = rng.normal(0, 2, 300).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits * 2) / 2  # ties
        top_k, top_p = int(rng.integers(1, 300)), float(rng.uniform(0.01, 0.999))
        temperature = float(rng.choice([0.5, 1.0, 2.0]))
        kept = (
            kept_weights(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
            > 0
        )
        scores = torch.from_numpy(logits)[None] / temperature
        scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        theirs = np.isfinite(scores[0].numpy())
        assert abs(int(kept.sum()) - int(theirs.sum())) <= mass_on_the_edge(
            logits, temperature, top_k, top_p
        )
        if len(np.unique(logits)) == len(logits) and kept.sum() == theirs.sum():
            assert (kept == theirs).all()


def mass_on_the_edge(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> int:
    """1 where p lies within 1e-5 of a possible mass, so that float32 sums may decide otherwise."""
    weights = np.sort(kept_weights(logits, SamplingParams(temperature=temperature, top_k=top_k)))[
        ::-1
    ]
    mass = np.cumsum(weights) / weights.sum()
    return int(np.abs(mass - top_p).min() < 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
)
def test_frequencies_match_exact_probabilities(options: dict[str, float]) -> None:
    """Chi-square over 20,000 coins; with fixed seeds it either always passes or never."""
    logits = np.random.default_rng(5).normal(0, 1.5, 40).astype(np.float32)
    count, seats = 20_000, 2_000
    sampler = TorchSampler(seats, torch.device("cpu"))
    rows = torch.from_numpy(np.tile(logits, (seats, 1)))
    drawn: list[int] = []
    for start in range(0, count, seats):
        for seat in range(seats):
            sampler.bind(seat, SamplingParams(seed=start + seat, **options), 17)
        draws = sampler.draw(rows, np.arange(seats, dtype=np.int32), [-1] * seats)
        drawn += [one.token_id for one in draws]
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
