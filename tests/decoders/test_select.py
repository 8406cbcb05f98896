"""Which decoder a model gets, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import fastgen
from fastgen.decoders import select


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "cuda", "device": "cpu"}, "decoder='cuda': "),
        ({"kv_dtype": "int8", "decoder": "torch"}, "kv_dtype='int8': the torch decoder cannot"),
        ({"kv_dtype": "fp8"}, "kv_dtype must be one of auto, int8"),
        ({"decoder": "torch", "batch_invariant": True}, "batch_invariant=True"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastgen.load(**options)


def test_on_a_gpu_without_triton_torch_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be seen without a GPU: the device is only looked at after the choice."""
    monkeypatch.setattr(select, "_has_gpu", lambda: True)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )
    with pytest.warns(UserWarning, match="Triton is not installed"):
        model = fastgen.load(max_seq_len=64)
    with model:
        assert model.plan.decoder == "torch"
        assert "the CUDA decoder cannot be used: Triton is not installed" in model.plan.reason
        assert model("In the", max_new_tokens=2)
    with pytest.raises(ValueError, match="decoder='cuda': Triton is not installed"):
        fastgen.load(decoder="cuda")
