"""What a CUDA decoder does before its first request leaves no trace in those that come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgen
from kernel_device import quiet

pytestmark = quiet


@pytest.mark.parametrize("num_tokens", [2, 24, 150])  # the last in several rows of the spare block
def test_a_rehearsal_changes_nothing(variant: Callable[[str], Path], num_tokens: int) -> None:
    params = fastgen.SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True, logprobs=0)
    prompt = np.random.default_rng(0).integers(1, 200, 40).tolist()
    options: dict[str, Any] = {"decoder": "cuda", "max_batch_size": 2, "max_seq_len": 64}
    with fastgen.load(variant("one_layer"), **options) as model:
        [wanted] = model.generate([prompt], params)
        decoder: Any = model.engine.decoder
        decoder.rehearse(num_tokens)
        [found] = model.generate([prompt], params)  # its beginning is found in the cache
        assert found.completions[0].token_ids == wanted.completions[0].token_ids
        model.warmup()
        again = model.generate([prompt[::-1], prompt], params)
    assert again[1].completions[0].token_ids == wanted.completions[0].token_ids
