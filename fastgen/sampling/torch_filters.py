"""fastgen.sampling.filters in PyTorch, for many rows at once.

No vocabulary is sorted: top_h and top_k look at candidates only, as do all filters after them,
unless top_n_sigma has to look at all before; top_p and typical_p look at the best 256, then at
eight times as many, until the mass is reached.

Shapes: n rows, V vocabulary, K candidates of a row (V, or few), in ascending order of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgen.sampling.filters import EDGE, TOP_H_CANDIDATES, TYPICAL_STEP
from fastgen.sampling.options import BY_NAME
from fastgen.sampling.params import SamplingParams

Options = NDArray[np.void]  # (n,) with FILTER_FIELDS
Filter = Callable[[Tensor, Tensor, Tensor], None]  # its setting is (n, 1)

MOST_CANDIDATES = 1024  # with more, a path that looks at everything is faster
_WIDTH = 256  # how many are looked at first where a mass is to be reached
_LOWEST = torch.finfo(torch.float32).min


def filter_options(params: SamplingParams, vocab_size: int) -> dict[str, Any]:
    """A row's values of FILTER_FIELDS."""
    top_k = params.top_k if params.top_k < vocab_size else 0
    num_candidates = top_k if top_k <= MOST_CANDIDATES else 0
    if params.top_h is not None:
        num_candidates = min(TOP_H_CANDIDATES, vocab_size)
    if params.top_n_sigma > 0:
        num_candidates = 0
    own = {name: getattr(params, name) or 0 for name in FILTERS}
    top_k = 0 if top_k == num_candidates else top_k
    return {"num_candidates": num_candidates, **own, "top_k": top_k}


def kept_weights(scaled: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Unnormalized probabilities, float64 (n, K), zero for what the filters removed.

    Args:
        scaled: float32 (n, V), logits divided by the temperature, the highest finite; may change.
        options: all with num_candidates, or all without.

    Returns:
        Them, and the candidates' ids, int64 (n, K); None: the candidates are the whole vocabulary.
    """
    if options["num_candidates"].any():
        values, token_ids = candidates(scaled, options["num_candidates"])
    else:
        values, token_ids = scaled, None
    _apply(_VALUE_FILTERS, values, values, options)
    weights = values.double().sub_(values.amax(1, keepdim=True)).exp_()
    _apply(_WEIGHT_FILTERS, values, weights, options)
    return weights, token_ids


def candidates(values: Tensor, counts: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
    """The `counts` highest of each row, and all equals of the last of them.

    Returns:
        Values (n, K) in ascending order of their ids, -inf for those not asked for, and the ids;
        None for the ids: K is V.
    """
    width = min(int(counts.max()) + 1, values.shape[1])
    best, token_ids = values.topk(width)
    last = best.gather(1, _column(counts - 1, values)).clamp_min(_LOWEST)  # (n, 1); never -inf
    if bool((best[:, -1:] >= last).any()):  # there may be more equals of it
        width = int((values >= last).sum(1).amax())
        if width > MOST_CANDIDATES:
            return values.masked_fill(values < last, -math.inf), None
        best, token_ids = values.topk(width)
    token_ids, order = token_ids.sort(1)
    best = best.gather(1, order)
    return best.masked_fill_(best < last, -math.inf), token_ids


def _apply(filters: Mapping[str, Filter], values: Tensor, target: Tensor, options: Options) -> None:
    """Let each filter change `target` in place, in the rows where it is on."""
    for name, apply in filters.items():
        on = np.flatnonzero(options[name] != (BY_NAME[name].default or 0))
        if not len(on):
            continue
        setting = _column(options[name][on], values)
        if len(on) == len(options):
            apply(values, target, setting)
        else:
            rows = torch.from_numpy(on).to(values.device)
            some = target.index_select(0, rows)
            apply(values.index_select(0, rows), some, setting)
            target[rows] = some


def _top_n_sigma(values: Tensor, target: Tensor, top_n_sigma: Tensor) -> None:
    gaps = _gaps(values)
    finite = gaps.isfinite()
    count = finite.sum(1, keepdim=True)
    mean = gaps.where(finite, 0).sum(1, keepdim=True) / count
    variance = (gaps - mean).square_().where(finite, 0).sum(1, keepdim=True) / count
    target.masked_fill_(gaps < -top_n_sigma * variance.sqrt() * (1 + EDGE), -math.inf)


def _top_h(values: Tensor, target: Tensor, top_h: Tensor) -> None:
    best = values.topk(min(TOP_H_CANDIDATES, values.shape[1])).values  # (n, 100), highest first
    gaps = best.double() - best[:, :1].double()
    weights = gaps.exp()
    total = weights.sum(1, keepdim=True)
    entropy = (weights * (total.log() - gaps)).where(weights > 0, 0.0).cumsum(1)
    goal = top_h * entropy[:, -1:] * (1 + EDGE)
    last = ((entropy <= goal).sum(1, keepdim=True) - 1).clamp_min_(0)
    target.masked_fill_(_behind(values, best, last), -math.inf)


def _top_k(values: Tensor, target: Tensor, top_k: Tensor) -> None:
    best = values.topk(min(int(top_k.amax()), values.shape[1])).values
    kth = best.gather(1, (top_k - 1).clamp_max_(best.shape[1] - 1))
    target.masked_fill_(values < kth, -math.inf)  # equals of the k-th stay


def _top_p(values: Tensor, weights: Tensor, top_p: Tensor) -> None:
    weights.masked_fill_(_behind(values, *_search(values, weights, top_p)), 0)


def _min_p(values: Tensor, weights: Tensor, min_p: Tensor) -> None:
    weights.masked_fill_(weights < min_p, 0)  # the highest is exp(0) = 1


def _typical(values: Tensor, weights: Tensor, typical_p: Tensor) -> None:
    gaps = _gaps(values)
    nearness = (gaps - _mean_gap(gaps, weights)).abs_().div_(TYPICAL_STEP).round_().neg_()
    best, last = _search(nearness, weights, typical_p)
    weights.masked_fill_(nearness < best.gather(1, last), 0)  # equals of the last stay


def _epsilon(values: Tensor, weights: Tensor, epsilon: Tensor) -> None:
    _at_least(values, weights, epsilon * weights.sum(1, keepdim=True))


def _eta(values: Tensor, weights: Tensor, eta: Tensor) -> None:
    mean = _mean_gap(_gaps(values), weights)  # exp(-entropy) = exp(mean gap) / total
    least = torch.minimum(eta * weights.sum(1, keepdim=True), eta.sqrt() * mean.exp())
    _at_least(values, weights, least)


# In the order of fastgen.sampling.filters; the first change values, the others weights.
_VALUE_FILTERS: dict[str, Filter] = {"top_n_sigma": _top_n_sigma, "top_h": _top_h, "top_k": _top_k}
_WEIGHT_FILTERS: dict[str, Filter] = {
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
}
FILTERS = (*_VALUE_FILTERS, *_WEIGHT_FILTERS)
# Options whose default is None are off at 0; top_k is on where num_candidates is not the same.
FILTER_FIELDS = [
    ("num_candidates", np.int64),  # no more than the highest so many are looked at; 0: all
    *((name, np.int64 if type(BY_NAME[name].default) is int else np.float64) for name in FILTERS),
]


def _search(keys: Tensor, weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The best keys (n, width), best first, and where among them (n, 1) the running weight reaches
    `share` of all. Only the best are looked at, more of them while it is not reached."""
    goal = share * weights.sum(1, keepdim=True)
    width = min(_WIDTH, keys.shape[1])
    while True:
        best, index = keys.topk(width)
        reached = weights.gather(1, index).cumsum(1) >= goal
        if width == keys.shape[1] or bool(reached[:, -1].all()):
            break
        width = min(8 * width, keys.shape[1])
    last = torch.where(reached[:, -1:], reached.byte().argmax(1, keepdim=True), width - 1)
    return best, last


def _behind(values: Tensor, best: Tensor, last: Tensor) -> Tensor:
    """What comes after best[last], bool (n, K); of its equals, the lowest ids come before it."""
    edge = best.gather(1, last)  # (n, 1)
    num_equal = last + 1 - (best > edge).sum(1, keepdim=True)
    equal = values == edge
    after = values < edge
    if bool((equal.sum(1, keepdim=True) > num_equal).any()):
        after |= equal & (equal.cumsum(1) > num_equal)
    return after


def _at_least(values: Tensor, weights: Tensor, least: Tensor) -> None:
    """Keep weights that are high enough, and in any case the highest logit and its equals."""
    highest = values.where(weights > 0, -math.inf).amax(1, keepdim=True)
    weights.masked_fill_((weights < least) & (values < highest), 0)


def _gaps(values: Tensor) -> Tensor:
    return values.double().sub_(values.amax(1, keepdim=True))


def _mean_gap(gaps: Tensor, weights: Tensor) -> Tensor:
    """sum(weight * gap) / sum(weight) over what has weight."""
    weighted = (weights * gaps).masked_fill_(weights == 0, 0)
    return weighted.sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _column(values: NDArray[Any], like: Tensor) -> Tensor:
    """(n, 1) on the device of `like`."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)[:, None]
