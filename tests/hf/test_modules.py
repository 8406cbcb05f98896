"""The modules decide what is computed, whatever the config says, as with transformers' class."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from hf_models import fresh_pair, generated, kv_rows_of, random_ids, tolerance

Model = Any


def _append_a_copy(model: Model) -> None:
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def _append_a_new_layer(model: Model) -> None:
    torch.manual_seed(5)
    model.transformer.h.append(GPT2Block(model.config, layer_idx=3).eval())


def _repeat_a_layer(model: Model) -> None:
    model.transformer.h[2] = model.transformer.h[1]


def _exchange_layers(model: Model) -> None:
    layers = list(model.transformer.h)
    model.transformer.h = nn.ModuleList([layers[0], layers[2], layers[1]])


def _cut_layers(model: Model) -> None:
    del model.transformer.h[2:]


def _cut_layers_and_say_so(model: Model) -> None:
    _cut_layers(model)
    model.config.n_layer = 2


def _two_heads(model: Model) -> None:
    for block in model.transformer.h:
        block.attn.num_heads, block.attn.head_dim = 2, 16


def _set(path: str, value: Any) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


def _set_config(key: str, value: Any) -> Callable[[Model], None]:
    return lambda model: setattr(model.config, key, value)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "a copy of a layer appended": _append_a_copy,
    "a new layer appended": _append_a_new_layer,
    "a layer twice": _repeat_a_layer,
    "layers exchanged": _exchange_layers,
    "layers cut": _cut_layers,
    "layers cut, and the config": _cut_layers_and_say_so,
    "n_layer smaller": _set_config("n_layer", 2),
    "n_head": _set_config("n_head", 2),
    "n_head larger": _set_config("n_head", 8),
    "no heads": _set_config("n_head", 5),
    "n_inner": _set_config("n_inner", 64),
    "n_embd": _set_config("n_embd", 64),
    "vocab_size": _set_config("vocab_size", 100),
    "n_positions": _set_config("n_positions", 50),
    "activation_function": _set_config("activation_function", "relu"),
    "layer_norm_epsilon": _set_config("layer_norm_epsilon", 0.5),
    "scale_attn_weights": _set_config("scale_attn_weights", False),
    "other heads": _two_heads,
    "an activation": _set("transformer.h.1.mlp.act", nn.ReLU()),
    "an activation's function": _set("transformer.h.1.mlp.act.act", torch.tanh),
    "an epsilon": _set("transformer.h.1.ln_2.eps", 0.3),
    "max_norm": _set("transformer.wte.max_norm", 1.0),
    "padding_idx": _set("transformer.wte.padding_idx", 40),
    "scaling": _set("transformer.h.1.attn.scaling", 0.9),
    "not causal": _set("transformer.h.1.attn.is_causal", False),
    "dropout in one layer": lambda model: model.transformer.h[1].mlp.dropout.train(),
    "a dropout replaced": _set("transformer.h.1.mlp.dropout", nn.Tanh()),
    "a dropout replaced by dropout": _set("transformer.drop", nn.AlphaDropout(0.5).eval()),
    "the norm left out": _set("transformer.ln_f", nn.Identity()),
}


@pytest.mark.parametrize("when", ["before the first call", "after it"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_computed(change: str, when: str) -> None:
    """With a cache and without, in a forward and in a generation; and after a second forward."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(0), 2, 8) % 97
    if when == "after it":
        kv_rows_of(ours)
    for model in (theirs, ours):
        CHANGES[change](model)
    with torch.no_grad():
        for use_cache in (True, False, True):
            expected, got = (_outcome(model, ids, use_cache) for model in (theirs, ours))
            if isinstance(expected, Exception):
                assert type(got) is type(expected) and str(got) == str(expected)
            else:
                assert got.shape == expected.shape
                assert (got - expected).abs().max() < tolerance(expected), ours.last_path
    call = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    first, second = (generated(model, **call) for model in (theirs, ours))
    if isinstance(first, Exception):
        assert type(second) is type(first)
    else:
        assert torch.equal(first, second), ours.last_path


def _outcome(model: Model, ids: torch.Tensor, use_cache: bool) -> Any:
    torch.manual_seed(0)
    try:
        return model(ids, use_cache=use_cache).logits
    except Exception as error:
        return error


@pytest.mark.parametrize("layers", [1, 2])
def test_early_exit_leaves_no_smaller_model(layers: int) -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(1), 1, 8)
    call = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    expected = generated(theirs, **call)
    outcomes = [generated(m, **call, assistant_early_exit=layers) for m in (theirs, ours)]
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], torch.Tensor):
        assert torch.equal(*outcomes)
    for model in (theirs, ours):
        model.config.n_layer = 3  # where transformers has failed, it does not put that back
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generated(ours, **call), expected)
    assert (ours.last_path, ours.last_reason) == ("native", "")


def test_a_config_that_says_less_for_a_while() -> None:
    """The packed weights stay."""
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(2), 1, 8)
    kv = kv_rows_of(ours)
    for key, value in (("n_layer", 1), ("is_causal", False), ("sliding_window", 4)):
        before = getattr(ours.config, key, None)
        with torch.no_grad():
            setattr(ours.config, key, value)
            ours(ids, use_cache=False)
            assert ours.last_path == "transformers" and key in ours.last_reason
            setattr(ours.config, key, before)
            ours(ids)
        assert ours.last_path == "forward" and kv_rows_of(ours) is kv


def test_a_refused_model_is_run_when_the_config_fits_it() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(3), 1, 8)
    ours.config.n_head = 2
    with torch.no_grad():
        refused = ours(ids).logits
    assert torch.equal(refused, theirs(ids).logits) and ours.last_path == "transformers"
    assert "is not what the config says" in ours.last_reason
    ours.config.n_head = 4
    with torch.no_grad():
        assert (ours(ids).logits - refused).abs().max() < tolerance(refused)
    assert ours.last_path == "forward"


def test_global_hooks_count_as_long_as_there_are_any() -> None:
    theirs, ours = fresh_pair()
    ids = random_ids(theirs, np.random.default_rng(4), 1, 8)
    kv = kv_rows_of(ours)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    try:
        with torch.no_grad():
            ours(ids)
            assert ours.last_path == "transformers" and "GPT2MLP" in seen
    finally:
        handle.remove()
    with torch.no_grad():
        ours(ids)
    assert ours.last_path == "forward" and kv_rows_of(ours) is kv


def test_random_numbers_are_left_alone() -> None:
    _, ours = fresh_pair()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    kv_rows_of(ours)
    assert torch.equal(torch.rand(3), expected)
