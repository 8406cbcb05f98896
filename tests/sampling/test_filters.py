"""What may be drawn: the filters' definition against transformers' own classes.

Kept sets are compared by their logits: among equals at an edge, transformers' choice follows its
sort. Where a mass or a threshold is too near to an edge, its float32 sums may decide otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from fastgen import SamplingParams
from fastgen.sampling.filters import kept_weights
from fastgen.sampling.torch_filters import FILTER_FIELDS, Options, candidates, filter_options
from fastgen.sampling.torch_filters import kept_weights as kept_by_torch
from sampling_harness import adversarial_logits, random_filters, random_logits
from tolerances import TOLERANCES

EDGE = TOLERANCES["filter_edge"]


class TopNSigma(hf.LogitsProcessor):
    """As llama.cpp has it; transformers has none."""

    def __init__(self, n: float) -> None:
        self.n = n

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite = scores[scores.isfinite()].double()
        least = finite.max() - self.n * finite.std(correction=0)
        return scores.masked_fill(scores < least, -torch.inf)


# in transformers' order
THEIRS: dict[str, Callable[[Any], Any]] = {
    "temperature": hf.TemperatureLogitsWarper,
    "top_n_sigma": TopNSigma,
    "top_h": hf.TopHLogitsWarper,
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
    "typical_p": hf.TypicalLogitsWarper,
    "epsilon_cutoff": hf.EpsilonLogitsWarper,
    "eta_cutoff": hf.EtaLogitsWarper,
}


def by_transformers(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which are kept, bool (V,)."""
    chain = hf.LogitsProcessorList(
        make(getattr(params, name))
        for name, make in THEIRS.items()
        if getattr(params, name) != getattr(SamplingParams, name)
    )
    scores = chain(torch.zeros((1, 1), dtype=torch.int64), torch.from_numpy(logits.copy())[None])
    kept_by_them: np.ndarray = np.isfinite(scores[0].numpy())
    return kept_by_them


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    return kept_weights(logits, params) > 0


def is_near_an_edge(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether a little more or less of any option keeps another set."""
    wanted = kept(logits, params).sum()
    for name in [name for name in THEIRS if name not in ("temperature", "top_k")]:
        value = getattr(params, name)
        if value == getattr(SamplingParams, name):
            continue
        step = {
            "top_h": EDGE / max(entropy(logits, params), EDGE),
            "top_p": EDGE,
            "typical_p": EDGE,
        }
        for shift in (step.get(name, value * EDGE), -step.get(name, value * EDGE)):
            most = 1e6 if name == "top_n_sigma" else 1 - 1e-9
            near = replace(params, **{name: min(max(value + shift, 1e-9), most)})
            if kept(logits, near).sum() != wanted:
                return True
    return params.typical_p < 1 and distances_are_near(logits, params)


def entropy(logits: np.ndarray, params: SamplingParams) -> float:
    """In nats, of the best 100."""
    before = SamplingParams(temperature=params.temperature, top_n_sigma=params.top_n_sigma)
    probs = np.sort(kept_weights(logits, before))[-100:]
    probs = probs[probs > 0] / probs.sum()
    return float(-(probs * np.log(probs)).sum())


def distances_are_near(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether typical_p has to choose between a token above the entropy and one below it that are
    as far from it, or nearly so."""
    weights = kept_weights(
        logits, replace(params, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0)
    )
    probs = weights[weights > 0] / weights.sum()
    information = -np.log(probs)
    distance = np.sort(np.abs(information - (probs * information).sum()))
    steps = np.diff(distance)
    return bool(((steps > 1e-12) & (steps < EDGE)).any())


def assert_keeps_as_transformers(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether it was compared."""
    ours, theirs = kept(logits, params), by_transformers(logits, params)
    scaled = logits / np.float32(params.temperature)
    theirs &= scaled.astype(np.float64) - scaled.max() > -745  # below, weights are 0
    if np.array_equal(np.sort(logits[ours]), np.sort(logits[theirs])):
        return True
    assert is_near_an_edge(logits, params), (params, ours.sum(), theirs.sum())
    return False


def test_temperature_is_the_same_division() -> None:
    [logits] = random_logits(np.random.default_rng(0), 1, 300)
    theirs = hf.TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits)[None])[0].numpy()
    np.testing.assert_array_equal(logits / np.float32(0.7), theirs)


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "temperature"])
def test_each_keeps_what_transformers_keeps(name: str) -> None:
    rng = np.random.default_rng(len(name))
    compared, removing = 0, 0
    for _ in range(300):
        [logits] = random_logits(rng, 1, int(rng.choice([5, 63, 300, 1111])))
        options: dict[str, Any] = {}
        while name not in options:
            options = random_filters(rng, 0.9)
        params = SamplingParams(temperature=float(rng.choice([0.5, 1, 2])), **{name: options[name]})
        compared += assert_keeps_as_transformers(logits, params)
        removing += kept(logits, params).sum() < np.isfinite(logits).sum()
    assert compared > 285, "too many trials lay on an edge"
    assert removing > 100, "most trials kept everything"


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_the_chain_keeps_what_transformers_keeps(share: float) -> None:
    rng = np.random.default_rng(int(share * 10))
    compared = 0
    for _ in range(300):
        [logits] = random_logits(rng, 1, int(rng.choice([5, 63, 300, 1111])))
        temperature = float(rng.choice([0.5, 1, 2]))
        params = SamplingParams(temperature=temperature, **random_filters(rng, share))
        compared += assert_keeps_as_transformers(logits, params)
    assert compared > 280, "too many trials lay on an edge"


def torch_kept(logits: np.ndarray, params: list[SamplingParams]) -> np.ndarray:
    """Weights (n, V) of rows that all have few candidates, or none of which has."""
    options: Options = np.zeros(len(params), FILTER_FIELDS)
    for row, one in enumerate(params):
        options[row] = tuple(filter_options(one, logits.shape[1]).values())
    divisors = np.array([one.temperature for one in params], np.float32)[:, None]
    weights, token_ids = kept_by_torch(torch.from_numpy(logits / divisors), options)
    if token_ids is None:
        return weights.numpy()
    return torch.zeros(logits.shape).double().scatter_(1, token_ids, weights).numpy()


@pytest.mark.parametrize("vocab_size", [5, 64, 2000])
@pytest.mark.parametrize("few", [True, False])
def test_torch_keeps_the_same_ids(few: bool, vocab_size: int) -> None:
    """Not only as many: of equals at an edge, the lowest ids. With weights that are the same."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(60):
        logits = adversarial_logits(rng, vocab_size)
        params = []
        for _ in logits:
            options = random_filters(rng, 0.5)
            if few:
                options |= {"top_k": int(rng.integers(1, min(vocab_size, 1024))), "top_n_sigma": 0}
            else:
                options |= {"top_k": int(rng.choice([0, 1500])), "top_h": None}
            params.append(SamplingParams(temperature=float(rng.choice([0.5, 1, 2])), **options))
        for row, one, found in zip(logits, params, torch_kept(logits, params), strict=True):
            wanted = kept_weights(row, one)
            assert np.flatnonzero(found).tolist() == np.flatnonzero(wanted).tolist(), one
            np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_the_lowest_ids_of_equals_stay() -> None:
    logits = np.array([1, 3, 1, 3, 1, 3, 1], np.float32)
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"top_k": 4}, [0, 1, 2, 3, 4, 5, 6]),  # all equals of the 4th
        ({"top_k": 2}, [1, 3, 5]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.85}, [0, 1, 3, 5]),
        ({"top_h": 0.6}, [1, 3]),
    ]
    for options, wanted in cases:
        params = SamplingParams(**options)
        assert np.flatnonzero(kept_weights(logits, params)).tolist() == wanted, options
        assert np.flatnonzero(torch_kept(logits[None], [params])[0]).tolist() == wanted, options


@pytest.mark.parametrize("share", [0.07, 0.29, 0.5, 0.57, 0.99])
def test_top_h_keeps_its_share_of_equals_however_sums_are_rounded(share: float) -> None:
    logits = np.full((1, 130), 0.3, np.float32)
    params = SamplingParams(top_h=share)
    assert kept(logits[0], params).sum() == round(100 * share)
    assert (torch_kept(logits, [params]) > 0).sum() == round(100 * share)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_top_n_sigma_keeps_the_same_whatever_the_temperature(temperature: float) -> None:
    """Deviation and distances are scaled alike. What is at the edge is kept."""
    logits = np.array([[4, 0, 4, 0, -np.inf]], np.float32)  # a deviation of 2, of four
    for n, wanted in [(1e-9, [0, 2]), (1.9, [0, 2]), (2.0, [0, 1, 2, 3]), (1e6, [0, 1, 2, 3])]:
        params = SamplingParams(top_n_sigma=n, temperature=temperature)
        assert np.flatnonzero(kept(logits[0], params)).tolist() == wanted
        assert np.flatnonzero(torch_kept(logits, [params])[0]).tolist() == wanted


def test_top_n_sigma_looks_at_all_logits_before_the_other_filters() -> None:
    """And they look at what it has left."""
    logits = np.array([6, 5, 4, 3, 0, 0, 0, 0], np.float32)
    alone = kept(logits, SamplingParams(top_n_sigma=1))
    assert np.flatnonzero(alone).tolist() == [0, 1, 2][: round(logits.std() // 1) + 1]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 7}, [0, 1, 2]),
        ({"top_h": 1.0}, [0, 1, 2]),
        ({"top_h": 1.0, "top_k": 1}, [0]),
        ({"min_p": 0.2}, [0, 1]),
    ]
    for options, wanted in cases:
        params = SamplingParams(top_n_sigma=1, **options)
        assert np.flatnonzero(kept(logits, params)).tolist() == wanted, options
        assert np.flatnonzero(torch_kept(logits[None], [params])[0]).tolist() == wanted, options


def test_candidates_are_few_where_little_is_left() -> None:
    values = torch.full((2, 5000), -torch.inf)
    values[0, [7, 4000]] = torch.tensor([1.0, 2.0])
    values[1, [3, 9, 11]] = 1.0
    best, token_ids = candidates(values, np.array([50, 2]))
    assert token_ids is not None and best.shape[1] <= 51
    assert token_ids[0, best[0].isfinite()].tolist() == [7, 4000]
    assert token_ids[1, best[1].isfinite()].tolist() == [3, 9, 11]
