"""Which tokens a sampled row may draw, and with what weight: the filters' definition, for one row.

    temperature -> top_n_sigma -> top_h -> top_k -> top_p -> min_p -> typical_p
                -> epsilon_cutoff -> eta_cutoff

Each filter sees what those before it left, as in transformers; top_n_sigma is llama.cpp's, which
has it before top_k, too. Shapes: V vocabulary; `gaps` float64
(V,) is logit - max, so weights = exp(gaps) are probabilities but for one factor. -log p of a token
is then log(total) - gap, and the entropy is log(total) - (the weighted mean of the gaps).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgen.sampling.params import SamplingParams

Weights = NDArray[np.float64]
TOP_H_CANDIDATES = 100
TYPICAL_STEP = 2.0**-40  # nats: nearer than this, distances to the entropy are equal
EDGE = 1e-12  # top_h, top_n_sigma: what is this near to an edge is within, however it was rounded


def kept_weights(logits: NDArray[np.float32], params: SamplingParams) -> Weights:
    """Unnormalized probabilities, float64 (V,); zero for what the filters removed.

    The highest of the logits must be finite after the division by the temperature.
    """
    with np.errstate(over="ignore"):  # -1e38 / 0.1 is as good as -inf
        scaled = logits / np.float32(params.temperature)
    gaps = scaled.astype(np.float64) - np.float64(scaled.max())
    weights = np.exp(gaps)
    if params.top_n_sigma > 0:
        _top_n_sigma(gaps, weights, params.top_n_sigma)
    if params.top_h is not None:
        _top_h(scaled, gaps, weights, params.top_h)
    if params.top_k:
        _top_k(scaled, weights, params.top_k)
    if params.top_p < 1:
        _top_p(scaled, weights, params.top_p)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0  # the highest is exp(0) = 1
    if params.typical_p < 1:
        _typical(gaps, weights, params.typical_p)
    if params.epsilon_cutoff > 0:
        _at_least(scaled, weights, params.epsilon_cutoff * weights.sum())
    if params.eta_cutoff > 0:
        eta, total = params.eta_cutoff, weights.sum()  # exp(-entropy) = exp(mean gap) / total
        least = min(eta * total, np.sqrt(eta) * np.exp(_mean_gap(gaps, weights)))
        _at_least(scaled, weights, least)
    return weights


def _highest_first(scaled: NDArray[np.float32]) -> NDArray[np.intp]:
    """Ids; of equals the lowest id first."""
    return np.argsort(-scaled, kind="stable")


def _top_n_sigma(gaps: Weights, weights: Weights, top_n_sigma: float) -> None:
    """Keep what is at most so many standard deviations below the highest: the population's, over
    all finite logits. They and the gaps are scaled alike, whatever the temperature is."""
    sigma = np.std(gaps[np.isfinite(gaps)])
    weights[gaps < -top_n_sigma * sigma * (1 + EDGE)] = 0


def _top_h(scaled: NDArray[np.float32], gaps: Weights, weights: Weights, top_h: float) -> None:
    order = _highest_first(scaled)  # of the logits: their gaps may be rounded to equals
    best = order[:TOP_H_CANDIDATES]
    best = best[weights[best] > 0]  # those of weight 0 add nothing
    entropy = np.cumsum(weights[best] * (np.log(weights[best].sum()) - gaps[best]))
    size = np.searchsorted(entropy, top_h * entropy[-1] * (1 + EDGE), side="right")
    weights[order[max(1, int(size)) :]] = 0


def _top_k(scaled: NDArray[np.float32], weights: Weights, top_k: int) -> None:
    left = np.where(weights > 0, scaled, np.float32(-np.inf))
    if top_k < len(left):
        kth = np.partition(left, -top_k)[-top_k]
        weights[left < kth] = 0  # equals of the k-th stay


def _top_p(scaled: NDArray[np.float32], weights: Weights, top_p: float) -> None:
    order = _highest_first(scaled)
    mass = np.cumsum(weights[order])
    size = int(np.searchsorted(mass, top_p * mass[-1], side="left")) + 1
    weights[order[size:]] = 0


def _typical(gaps: Weights, weights: Weights, typical_p: float) -> None:
    """Keep the tokens whose information is nearest to the entropy; |information - entropy| is
    |gap - mean gap|. Equals of the last one stay."""
    steps = np.rint(np.abs(gaps - _mean_gap(gaps, weights)) / TYPICAL_STEP)
    distance = np.where(weights > 0, steps, np.inf)
    order = np.argsort(distance, kind="stable")
    mass = np.cumsum(weights[order])
    last = int(np.searchsorted(mass, typical_p * mass[-1], side="left"))
    weights[distance > distance[order[last]]] = 0


def _at_least(scaled: NDArray[np.float32], weights: Weights, least: float) -> None:
    """Keep weights that are high enough, and in any case the highest logit and its equals."""
    highest = scaled[weights > 0].max()
    weights[(weights < least) & (scaled < highest)] = 0


def _mean_gap(gaps: Weights, weights: Weights) -> float:
    """sum(weight * gap) / sum(weight) over what has weight."""
    left = weights > 0
    return float((weights[left] * gaps[left]).sum() / weights.sum())
