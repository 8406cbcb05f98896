"""Weights that change: they are never used stale; gradients are transformers' own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import fastgen
from fastgen.hf import packing
from fastgen.hf.checksums import checksums
from hf_models import fresh_pair, generated, kv_rows_of, random_ids, tolerance
from tolerances import TOLERANCES

Model = Any


def _optimizer_step(model: Model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ids = torch.arange(20, 60).view(2, 20)
    model.train()
    torch.manual_seed(0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


def _load_other_weights(model: Model) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    model.load_state_dict(other.state_dict())


def _replace_a_module(model: Model) -> None:
    torch.manual_seed(1)
    new = copy.deepcopy(model.transformer.h[1].mlp)
    with torch.no_grad():
        new.c_fc.weight.normal_()
    model.transformer.h[1].mlp = new


def _replace_data(model: Model) -> None:
    weight = model.transformer.h[0].attn.c_attn.weight
    weight.data = weight.data * 1.5


def _more_tokens(model: Model) -> None:
    torch.manual_seed(2)
    model.resize_token_embeddings(230, mean_resizing=False)
    with torch.no_grad():
        model.transformer.wte.weight[211:] *= 60  # as large as the others


@torch.no_grad()
def _write_in_place(model: Model) -> None:
    model.transformer.wpe.weight.mul_(1.2)


def _write_through_data(model: Model) -> None:
    """As running averages of weights, and merged adapters, are put in place."""
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def _change_epsilon(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    model.config.layer_norm_epsilon = 0.5


@torch.inference_mode()
def _write_in_inference_mode(model: Model) -> None:
    model.transformer.wpe.weight.mul_(1.3)


def _fused_optimizer_step(model: Model) -> None:
    """PyTorch counts no write; Trainer's default."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = torch.arange(20, 60).view(2, 20)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Model], Any]] = {
    "an optimizer's step": _optimizer_step,
    "a fused optimizer's step": _fused_optimizer_step,
    "load_state_dict": _load_other_weights,
    "a module replaced": _replace_a_module,
    "data replaced": _replace_data,
    "written in place": _write_in_place,
    "written in inference mode": _write_in_inference_mode,
    "written through data": _write_through_data,
    "another epsilon": _change_epsilon,
    "fewer tokens": lambda model: model.resize_token_embeddings(180),
    "more tokens": _more_tokens,
    "init_weights": lambda model: (torch.manual_seed(3), model.apply(model._init_weights)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(change: str) -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 9)[:, :8] % 170
    call = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    before = generated(ours, **call)
    with torch.no_grad():
        logits = ours(ids).logits
    for model in (theirs, ours):
        CHANGES[change](model)
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert got.shape != logits.shape or (got - logits).abs().max() > 1e-3
    assert (got - expected).abs().max() < tolerance(expected)
    assert ours.last_path == "forward", ours.last_reason
    after = generated(ours, **call)
    assert torch.equal(after, generated(theirs, **call))
    assert not torch.equal(after, before)


def _numpy_view(weight: torch.Tensor) -> Any:
    return weight.detach().numpy()


# What PyTorch's counters do not see, of matrices that samples hit anywhere or nowhere.
UNCOUNTED: dict[str, Callable[[Model], Any]] = {
    "a token's row": lambda m: m.transformer.wte.weight.data[77].mul_(-3),
    "a single value": lambda m: m.transformer.wte.weight.data[77, 5].add_(9),
    "half of the columns": lambda m: m.transformer.h[1].mlp.c_fc.weight.data[:, 1::2].mul_(3),
    "a head": lambda m: m.transformer.h[0].attn.c_proj.weight.data[8:16].zero_(),
    "a neuron, by NumPy": lambda m: np.multiply(
        (view := _numpy_view(m.transformer.h[2].mlp.c_proj.weight))[17], 9, out=view[17]
    ),
    "a neuron's bias": lambda m: m.transformer.h[1].mlp.c_fc.bias.data[33].add_(9),
    "signs": lambda m: m.transformer.wpe.weight.data[1:3].neg_(),
    "rows exchanged": lambda m: m.transformer.wpe.weight.data.copy_(
        m.transformer.wpe.weight.data[[0, 2, 1, *range(3, 96)]]
    ),
}


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("change", UNCOUNTED)
def test_uncounted_writes_are_seen(change: str, layout: str) -> None:
    """By forward and by generate, each of which is the first to see one; in columns, too."""
    theirs, ours = fresh_pair()
    if layout == "columns":
        for weight in [p for m in (theirs, ours) for p in m.parameters() if p.dim() == 2]:
            weight.data = weight.data.t().contiguous().t()
    ids = torch.tensor([[77, 30, 77, 40, 50, 60, 77, 19]])
    call = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    call["return_dict_in_generate"] = True
    with torch.no_grad():
        before = ours(ids).logits
        versions = [parameter._version for parameter in ours.parameters()]
        for model in (theirs, ours):
            UNCOUNTED[change](model)
        assert versions == [parameter._version for parameter in ours.parameters()]
        expected, got = theirs(ids).logits, ours(ids).logits
    assert (got - expected).abs().max() < tolerance(expected)
    assert ours.last_path == "forward" and (got - before).abs().max() > 10 * tolerance(expected)
    for model in (theirs, ours):
        UNCOUNTED[change](model)
        model.transformer.ln_f.weight.data[3] += 2
    results = [generated(model, **call) for model in (theirs, ours)]
    assert torch.equal(results[0].sequences, results[1].sequences) and ours.last_path == "native"
    difference = torch.stack(results[0].logits) - torch.stack(results[1].logits)
    assert difference.abs().max() < tolerance(torch.stack(results[0].logits))


def test_all_weights_are_read_once_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in each of its steps, which reads as much memory itself."""
    _, ours = fresh_pair()
    ids = torch.tensor([[20, 30, 40]])
    call = {"input_ids": ids, "max_new_tokens": 9, "do_sample": False}
    kv_rows_of(ours)
    reads: list[int] = []

    def counted(tensors: Any, num_threads: int) -> list[int]:
        reads.append(len(tensors))
        return checksums(tensors, num_threads)

    monkeypatch.setattr(packing, "checksums", counted)
    generated(ours, **call)
    assert ours.last_path == "native" and reads == [len(list(ours.parameters()))]
    generated(ours, **call, num_beams=2)
    assert ours.last_path == "native" and len(reads) == 2
    with torch.no_grad():
        cache = ours(ids).past_key_values
        assert len(reads) == 3
        for token_id in range(20, 26):
            ours(torch.tensor([[token_id]]), past_key_values=cache)
        assert len(reads) == 3
        ours(ids)
    assert len(reads) == 4


def test_a_cache_of_older_weights_is_computed_again() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(1), 2, 9)
    with torch.no_grad():
        cache = ours(ids[:, :8]).past_key_values
        for model in (theirs, ours):
            model.transformer.wte.weight.mul_(1.2)
        expected = theirs(ids).logits[:, -1:]
        got = ours(ids[:, 8:], past_key_values=cache).logits
    assert (got - expected).abs().max() < tolerance(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str) -> None:
    """Errors against float32 are at most twice transformers' own in that dtype (DESIGN, rule 2)."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(2), 3, 40)
    with torch.no_grad():
        exact = theirs.to(getattr(torch, dtype)).float()(ids).logits
        half = theirs.to(getattr(torch, dtype))(ids).logits
        got = ours.to(getattr(torch, dtype))(ids).logits
    assert got.dtype == half.dtype and ours.last_path == "forward"
    own, scale = (half.float() - exact).abs().max(), exact.abs().max()
    bounds = TOLERANCES[dtype]
    assert (got.float() - exact).abs().max() <= bounds["ratio"] * own + bounds["slack"] * scale
    sequences = generated(ours, input_ids=ids, max_new_tokens=5, do_sample=False)
    assert sequences.shape == (3, 45) and ours.last_path == "native"


def test_there_and_back() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(3), 1, 9)
    with torch.no_grad():
        ours(ids)
        ours.half().float()
        theirs.half().float()
        expected, got = theirs(ids).logits, ours(ids).logits
    assert (got - expected).abs().max() < tolerance(expected)


def test_copies_and_pickles_pack_their_own() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(6), 1, 5)
    call = {"input_ids": ids, "max_new_tokens": 9, "do_sample": False}
    expected = generated(ours, **call)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is fastgen.GPT2LMHeadModel
        with torch.no_grad():
            ours.transformer.wte.weight.mul_(1)
        assert torch.equal(generated(twin, **call), expected)
        assert twin._packed is not ours._packed


def test_accelerate_shares_weights_and_leaves_the_model_alone() -> None:
    theirs, _ = fresh_pair()
    ours: Any = fastgen.accelerate(theirs)
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert isinstance(ours, transformers.GPT2LMHeadModel)
    again: Any = fastgen.accelerate(ours)
    assert again is ours
    pairs = zip(theirs.parameters(), ours.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    theirs.train()
    assert ours.training and not ours.eval().transformer.training and not theirs.training
    ours.generate(torch.tensor([[20]]), max_new_tokens=2, pad_token_id=7)
    loaded = pickle.loads(pickle.dumps(theirs))
    assert type(loaded) is transformers.GPT2LMHeadModel and loaded._fastgen is None
    with pytest.raises(TypeError, match="not Linear"):
        fastgen.accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="not GPT2Model"):
        fastgen.accelerate(theirs.transformer)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m.transformer.h[0].mlp, "act", torch.nn.ReLU()), "mlp.act is a ReLU"),
        (lambda m: setattr(m.transformer.ln_f, "eps", 0.3), "another epsilon"),
        (lambda m: setattr(m.transformer.h[1].attn, "scale_attn_weights", False), "attn is not"),
        (lambda m: setattr(m.config, "_attn_implementation", "mine"), "attention is 'mine'"),
    ],
)
def test_modules_that_are_not_the_configs_are_left_alone(change: Any, why: str) -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(7), 1, 8)
    with torch.no_grad():
        ours(ids)
        for model in (theirs, ours):
            change(model)
        if why.endswith("'mine'"):
            register_attention(theirs.config)
        got = ours(ids).logits
        assert torch.equal(got, theirs(ids).logits) and ours.last_path == "transformers"
        assert why in ours.last_reason


def register_attention(config: Any) -> None:
    from transformers import AttentionInterface
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    AttentionInterface.register("mine", eager_attention_forward)


@torch.inference_mode()
def test_a_model_made_in_inference_mode() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(8), 1, 8)
    ours(ids)
    for model in (theirs, ours):
        model.transformer.h[0].attn.c_attn.weight.mul_(1.5)
    expected = theirs(ids).logits
    assert (ours(ids).logits - expected).abs().max() < tolerance(expected)


@pytest.mark.usefixtures("own_garbage")
def test_the_old_weights_go_when_new_ones_are_packed() -> None:
    """Unless somebody is using them: then his call ends with what it began with."""
    _, ours = fresh_pair()
    ids = torch.tensor([[20, 30, 40]])
    with torch.no_grad():
        cache = ours(ids).past_key_values
        old = weakref.ref(kv_rows_of(ours).decoder)
        ours.transformer.wte.weight.mul_(1.1)
        ours(ids)
        gc.collect()
        assert old() is None
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        twin.crop(-1)
        again = ours(torch.tensor([[50], [60]]), past_key_values=twin).logits
        assert again.shape == (2, 1, 211) and cache.get_seq_length() == 3


def test_weights_that_change_while_a_call_runs() -> None:
    _, ours = fresh_pair()
    call = {"input_ids": torch.tensor([[20, 30]]), "do_sample": False, "max_new_tokens": 12}

    class Writing(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            with torch.no_grad():
                ours.transformer.wpe.weight.mul_(1.0)
            ours(torch.tensor([[20, 30]]))

        def end(self) -> None:
            pass

    expected = generated(ours, **call)
    assert torch.equal(generated(ours, **call, streamer=Writing()), expected)
    assert isinstance(
        generated(ours, **call, num_beams=2, logits_processor=LogitsProcessorList([_write(ours)])),
        torch.Tensor,
    )


def _write(model: Model) -> Callable[[Any, Any], Any]:
    def processor(ids: Any, scores: Any) -> Any:
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(1.0)
            model(torch.tensor([[20, 30]]))
        return scores

    return processor
