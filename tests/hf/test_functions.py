"""Functions that somebody has replaced, in classes, modules and registries, are run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import masking_utils
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.models.gpt2 import modeling_gpt2

from fastgen.hf.functions import FORWARD, LOOPS
from hf_models import fresh_pair, generated, kv_rows_of, random_ids
from processes import run

_FILES = (
    *("models/gpt2/modeling_gpt2.py", "masking_utils.py", "cache_utils.py", "activations.py"),
    *("pytorch_utils.py", "modeling_layers.py", "sdpa_attention.py", "generation/utils.py"),
    *("logits_process.py", "stopping_criteria.py", "torch/nn/functional.py", "modules/module.py"),
    *("modules/linear.py", "modules/sparse.py", "modules/normalization.py", "modules/dropout.py"),
)


@contextmanager
def _calls(within: str = "") -> Iterator[set[CodeType]]:
    """The code of all functions that are called, by a function of the name `within`."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        above: FrameType | None = frame
        while within and above is not None and above.f_code.co_name != within:
            above = above.f_back
        if event == "call" and above is not None:
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _not_compared(seen: set[CodeType], compared: frozenset[CodeType]) -> set[str]:
    """Functions within functions are their code's own part."""
    return {
        code.co_qualname
        for code in seen - compared
        if code.co_filename.endswith(_FILES) and "<locals>" not in code.co_qualname
    }


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_all_that_a_forward_calls_is_compared(kind: str) -> None:
    theirs, _ = fresh_pair()
    theirs.set_attn_implementation(kind)
    ids = random_ids(theirs, np.random.default_rng(0), 2, 6)
    padded = (torch.arange(6) >= torch.tensor([[0], [2]])).long()
    with _calls("_wrapped_call_impl") as seen:
        theirs(ids)
        theirs(ids, attention_mask=padded, use_cache=False)
    assert not _not_compared(seen, FORWARD.codes)
    assert any(code.co_name == "eager_mask" for code in seen) == (kind == "eager")


@pytest.mark.parametrize("options", [{"do_sample": True, "top_p": 0.9}, {"num_beams": 2}])
def test_all_that_a_loop_calls_is_compared(options: dict[str, Any]) -> None:
    theirs, _ = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 6)
    loop = "_beam_search" if "num_beams" in options else "_sample"
    with _calls(loop) as seen:
        generated(theirs, input_ids=ids, max_new_tokens=3, **options)
    assert len(seen) > 100
    assert not {
        name
        for name in _not_compared(seen, FORWARD.codes | LOOPS.codes)
        if not name.endswith(".__init__")
    }


def _times(factor: float, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_gpt2.GPT2MLP, "forward"),
        (modeling_gpt2.Conv1D, "forward"),
        (torch.nn.LayerNorm, "__call__"),
        (torch.nn.functional, "layer_norm"),
        (torch, "addmm"),
        (masking_utils, "sdpa_mask"),
    ],
)
@torch.no_grad()
def test_a_patch_counts_as_long_as_it_is_there(owner: Any, name: str) -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(1), 2, 6)
    kv = kv_rows_of(ours)
    with mock.patch.object(owner, name, _times(0.5, getattr(owner, name))):
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert ours.last_path == "transformers" and f"{name} is not" in ours.last_reason
        generated(ours, input_ids=ids, max_new_tokens=2)
        assert ours.last_path == "transformers"
    ours(ids)
    assert ours.last_path == "forward" and kv_rows_of(ours) is kv


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GenerationMixin, "_sample"),
        (GenerationMixin, "_update_model_kwargs_for_generation"),
        (LogitsProcessorList, "__call__"),
    ],
)
def test_a_patched_loop_is_run(owner: Any, name: str) -> None:
    theirs, ours = fresh_pair()
    call = {"input_ids": random_ids(theirs, np.random.default_rng(2), 2, 6), "max_new_tokens": 3}
    function = getattr(owner, name)
    with mock.patch.object(owner, name, autospec=True, side_effect=function) as patched:
        expected = generated(theirs, **call, do_sample=False)
        times = patched.call_count
        assert torch.equal(generated(ours, **call, do_sample=False), expected)
        assert times > 0 and patched.call_count == 2 * times and ours.last_path == "forward"
    assert torch.equal(generated(ours, **call, do_sample=False), expected)
    assert ours.last_path == "native"


@torch.no_grad()
def test_what_no_function_reads_changes_nothing() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(3), 2, 6)
    kv = kv_rows_of(ours)
    ours.transformer.h[0].note = "mine"
    with (
        mock.patch.object(torch.nn.Module, "extra_repr", return_value="mine"),
        mock.patch.object(modeling_gpt2.GPT2Block, "note", 1, create=True),
    ):
        ours(ids)
        assert ours.last_path == "forward" and kv_rows_of(ours) is kv


_PATCHED_BEFORE = """
import torch
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2
own = modeling_gpt2.GPT2MLP.forward
modeling_gpt2.GPT2MLP.forward = lambda self, states: own(self, states) * 2
import fastgen
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=60000)).eval()
ours, ids = fastgen.accelerate(model), torch.tensor([[1, 2, 3]])
with torch.no_grad():
    assert torch.equal(ours(ids).logits, model(ids).logits)
    assert "GPT2MLP.forward is not" in ours.last_reason, ours.last_reason
    modeling_gpt2.GPT2MLP.forward = own
    expected = model(ids).logits
    assert (ours(ids).logits - expected).abs().max() < 1e-4 and ours.last_path == "forward"
"""


def test_a_patch_from_before_the_import() -> None:
    done = run([sys.executable, "-c", _PATCHED_BEFORE])
    assert done.returncode == 0, done.stderr
