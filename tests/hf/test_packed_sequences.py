"""Several sequences in one row, told apart by positions that start again: as in transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_models import fresh_pair, pair, random_ids, tolerance

CASES = {
    "plain": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "shifted": [[9, 10, 11, 12, 13, 14, 15, 16]],
    "two": [[0, 1, 2, 0, 1, 2, 3, 4]],
    "many": [[0, 0, 1, 0, 1, 2, 0, 0]],
    "a gap": [[0, 1, 2, 3, 10, 11, 12, 13]],
    "backwards": [[7, 6, 5, 4, 3, 2, 1, 0]],
    "rows of their own": [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]],
    "one of two rows": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 1, 2, 3]],
}


@pytest.mark.parametrize("use_cache", [True, False, None])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_positions(case: str, mask: bool, use_cache: bool | None) -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 8)
    arguments: dict[str, Any] = {"position_ids": torch.tensor(CASES[case])}
    if mask:
        arguments["attention_mask"] = torch.ones_like(ids)
    if use_cache is not None:
        arguments["use_cache"] = use_cache
    expected, got = (model(ids, **arguments).logits for model in (theirs, ours))
    assert (got - expected).abs().max() < tolerance(expected)
    packed = use_cache is False and not mask and case not in ("plain", "shifted")
    assert ours.last_path == ("transformers" if packed else "forward")
    assert ("packed" in ours.last_reason) == packed


@torch.no_grad()
def test_packed_rows_are_rows_of_their_own() -> None:
    """Also where the config turns the cache off."""
    _, ours = fresh_pair()
    ids = random_ids(ours, np.random.default_rng(1), 1, 11)
    apart = torch.cat([ours(ids[:, :4]).logits, ours(ids[:, 4:]).logits], 1)
    assert ours.last_path == "forward"
    ours.config.use_cache = False
    positions = torch.tensor([[*range(4), *range(7)]])
    together = ours(ids, position_ids=positions).logits
    assert (together - apart).abs().max() < tolerance(apart)


@torch.no_grad()
def test_losses_of_packed_and_padded_batches() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(2), 1, 11)
    labels = ids.clone()
    labels[0, 4] = -100
    positions = torch.tensor([[*range(4), *range(7)]])
    call = {"position_ids": positions, "labels": labels, "use_cache": False}
    first, second = (model(ids, **call).loss for model in (theirs, ours))
    assert second == pytest.approx(first.item(), abs=1e-5)


@torch.no_grad()
def test_one_dimension_of_positions() -> None:
    theirs, ours = pair()
    ids = random_ids(theirs, np.random.default_rng(3), 2, 8)
    for use_cache in (True, False):
        for positions in (torch.arange(8), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])):
            call = {"position_ids": positions, "use_cache": use_cache}
            outcomes = [_outcome(model, ids, call) for model in (theirs, ours)]
            if isinstance(outcomes[0], Exception):
                assert type(outcomes[1]) is type(outcomes[0])
            else:
                assert (outcomes[0] - outcomes[1]).abs().max() < tolerance(outcomes[0])


def _outcome(model: Any, ids: torch.Tensor, call: dict[str, Any]) -> Any:
    try:
        return model(ids, **call).logits
    except Exception as error:
        return error
