"""Random ways to alter a GPT-2 model, or what it is run with: whoever runs it has to see them.

An alteration takes a model, transformers' or fastgen's, a generator of random numbers, and a
stack that undoes what is not the model's own. With the same numbers it does the same to both.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

from patches import PATCHES, Alteration, Model, Random, block_of, factor_of, layer_of, pick, scaling

NUM_LAYERS, HIDDEN, VOCAB = 2, 32, 61
CONFIG = {
    **{"n_layer": NUM_LAYERS, "n_head": 4, "n_embd": HIDDEN, "vocab_size": VOCAB},
    **{"n_positions": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}


def _matrix(model: Model, rng: Random) -> Any:
    return pick(rng, [m for m in model.modules() if isinstance(m, (Conv1D, nn.Embedding))])


# Modules: exchanged, added, left out, of other classes.


def exchange_modules(model: Model, rng: Random, stack: ExitStack) -> None:
    one, other = model.transformer.h
    path = pick(rng, ("", "attn", "mlp", "ln_1", "ln_2", "mlp.c_fc", "attn.c_proj", "mlp.act"))
    if not path:
        model.transformer.h = nn.ModuleList([other, one])
        return
    first, second = one.get_submodule(path), other.get_submodule(path)
    one.set_submodule(path, second)
    if rng.random() < 0.5:
        other.set_submodule(path, first)


def exchange_norms(model: Model, rng: Random, stack: ExitStack) -> None:
    block = block_of(model, rng)
    block.ln_1, block.ln_2 = block.ln_2, block.ln_1


def insert_a_layer(model: Model, rng: Random, stack: ExitStack) -> None:
    block = block_of(model, rng)
    new = block if rng.random() < 0.3 else copy.deepcopy(block)
    if rng.random() < 0.5:
        model.transformer.h.append(new)
    else:
        model.transformer.h.insert(int(rng.integers(3)), new)
    if rng.random() < 0.3:
        for at, each in enumerate(model.transformer.h):
            each.attn.layer_idx = at
    if rng.random() < 0.5:
        model.config.n_layer += 1


def remove_a_layer(model: Model, rng: Random, stack: ExitStack) -> None:
    del model.transformer.h[int(rng.integers(NUM_LAYERS))]
    if rng.random() < 0.5:
        model.config.n_layer -= 1


def reorder_by_name(model: Model, rng: Random, stack: ExitStack) -> None:
    layers = model.transformer.h._modules
    layers["0"] = layers.pop("0")  # it keeps its name, and stands last


def replace_a_module(model: Model, rng: Random, stack: ExitStack) -> None:
    block = block_of(model, rng)
    new = pick(rng, (nn.Identity(), nn.Tanh(), nn.ReLU(), nn.Hardtanh(), nn.Dropout(0.1).eval()))
    path = pick(rng, ("ln_1", "ln_2", "mlp.act", "mlp.dropout", "attn.resid_dropout", "mlp"))
    block.set_submodule(path, new)


def wrap_a_module(model: Model, rng: Random, stack: ExitStack) -> None:
    block = block_of(model, rng)
    path = pick(rng, ("ln_1", "mlp", "attn.c_proj", "mlp.c_fc", "mlp.act"))
    block.set_submodule(path, nn.Sequential(block.get_submodule(path), nn.Hardtanh(-0.5, 0.5)))


def change_a_class(model: Model, rng: Random, stack: ExitStack) -> None:
    """A subclass, which computes the same or not."""
    module = layer_of(model, rng)
    factor = pick(rng, (1.0, factor_of(rng)))
    kind = type(module)
    forward = scaling(kind.forward, factor)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def other_norm(model: Model, rng: Random, stack: ExitStack) -> None:
    block = block_of(model, rng)
    options = pick(rng, ({"bias": False}, {"eps": 0.1}, {"elementwise_affine": False}, {}))
    block.ln_1 = nn.LayerNorm(HIDDEN, **options)


def add_a_module(model: Model, rng: Random, stack: ExitStack) -> None:
    """It is not called."""
    owner = pick(rng, (model, model.transformer, block_of(model, rng)))
    owner.extra = nn.Linear(HIDDEN, 2)


# Attributes and the config.


def set_an_attribute(model: Model, rng: Random, stack: ExitStack) -> None:
    attention, block = block_of(model, rng).attn, block_of(model, rng)
    owner, name, value = pick(
        rng,
        (
            *((attention, "scaling", value) for value in (0.2, torch.tensor(0.3))),
            *(
                (attention, "num_heads", 2),
                (attention, "head_dim", 16),
                (attention, "split_size", 8),
            ),
            *((attention, "is_causal", False), (attention, "layer_idx", 0)),
            (attention, "num_key_value_groups", 2),
            (attention, "reorder_and_upcast_attn", True),
            *((block.ln_1, "eps", 0.2), (model.transformer.ln_f, "eps", 1e-2)),
            *((block.mlp.c_fc, "nf", 16), (block.ln_2, "normalized_shape", (16,))),
            *((model.transformer.wte, "max_norm", 0.1), (model.transformer.wte, "padding_idx", 4)),
            *((block, "extra", 7), (attention, "name", "x"), (model.transformer, "tag", [1])),
            *((block.mlp, "act", torch.tanh), (attention, "q_attn", None)),
        ),
    )
    if name == "act":
        vars(block.mlp)["act"] = value
    else:
        setattr(owner, name, value)


def set_the_config(model: Model, rng: Random, stack: ExitStack) -> None:
    key, value = pick(
        rng,
        (
            *(("n_layer", 1), ("n_layer", 3), ("n_head", 2), ("n_embd", 16), ("vocab_size", 50)),
            *(("layer_norm_epsilon", 0.1), ("activation_function", "relu"), ("n_inner", 64)),
            *(("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)),
            *(("reorder_and_upcast_attn", True), ("tie_word_embeddings", False)),
            *(
                ("is_causal", False),
                ("use_cache", False),
                ("attn_pdrop", 0.3),
                ("sliding_window", 3),
            ),
        ),
    )
    setattr(model.config, key, value)


def set_training(model: Model, rng: Random, stack: ExitStack) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layer_of(model, rng).train()
    if rng.random() < 0.5:
        model.gradient_checkpointing_enable()


# Parameters: values, shapes, layouts, ties.


def write_values(model: Model, rng: Random, stack: ExitStack) -> None:
    weight = _matrix(model, rng).weight
    row = int(rng.integers(len(weight)))
    how = rng.integers(3)
    with torch.no_grad():
        if how == 0:
            weight[row] += 0.3
        elif how == 1:
            weight.data[:, :5] *= 1.5
        else:
            weight.detach().numpy()[row] -= 0.2


def replace_a_parameter(model: Model, rng: Random, stack: ExitStack) -> None:
    module = _matrix(model, rng)
    shape = module.weight.shape
    values = torch.from_numpy(rng.normal(0, 0.1, (2 * shape[0], 2 * shape[1])).astype(np.float32))
    view = pick(
        rng,
        (
            *(values[: shape[0], : shape[1]], values[::2, ::2], values[shape[0] :, shape[1] :]),
            values.t().contiguous().t()[: shape[0], : shape[1]],
            values[:1, : shape[1]].expand(shape),
            torch._neg_view(values)[: shape[0], : shape[1]],
        ),
    )
    if rng.random() < 0.5:
        module.weight = nn.Parameter(view)
    else:
        module.weight.data = view


def reshape_a_parameter(model: Model, rng: Random, stack: ExitStack) -> None:
    module = _matrix(model, rng)
    count = int(rng.integers(1, 40))
    module.weight = nn.Parameter(module.weight.detach()[:count].clone())


def drop_a_bias(model: Model, rng: Random, stack: ExitStack) -> None:
    module = pick(rng, [m for m in model.modules() if getattr(m, "bias", None) is not None])
    module.bias = None


def add_a_bias(model: Model, rng: Random, stack: ExitStack) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(VOCAB))


def change_the_tie(model: Model, rng: Random, stack: ExitStack) -> None:
    weight = model.transformer.wte.weight
    if rng.random() < 0.5:
        model.lm_head.weight = nn.Parameter(weight.detach() * 1.5)
    else:
        model.transformer.wte.weight = nn.Parameter(weight.detach() * 1.5)


def tie_layers(model: Model, rng: Random, stack: ExitStack) -> None:
    one, other = model.transformer.h
    path = pick(rng, ("attn.c_attn", "mlp.c_proj", "ln_1"))
    other.get_submodule(path).weight = one.get_submodule(path).weight


def set_a_dtype(model: Model, rng: Random, stack: ExitStack) -> None:
    if rng.random() < 0.5:
        model.to(torch.float64)
    else:
        pick(rng, (block_of(model, rng), model.transformer.ln_f)).to(torch.bfloat16)


def reparametrize(model: Model, rng: Random, stack: ExitStack) -> None:
    module = pick(rng, (block_of(model, rng).mlp.c_fc, block_of(model, rng).attn.c_proj))
    how = rng.integers(4)
    if how == 0:
        parametrizations.weight_norm(module)
    elif how == 1:
        parametrize.register_parametrization(module, "weight", nn.Hardtanh(-0.1, 0.1))
    elif how == 2:
        prune.l1_unstructured(module, "weight", amount=0.3)  # type: ignore[no-untyped-call]
    else:
        weight = module.weight
        del module.weight
        module.register_buffer("weight", weight.detach() * 1.1)


def add_a_buffer(model: Model, rng: Random, stack: ExitStack) -> None:
    layer_of(model, rng).register_buffer("extra_state", torch.ones(3))


ALTERATIONS: dict[str, Alteration] = {
    function.__name__: function
    for function in (
        *(exchange_modules, exchange_norms, insert_a_layer, remove_a_layer, reorder_by_name),
        *(replace_a_module, wrap_a_module, change_a_class, other_norm, add_a_module),
        *(set_an_attribute, set_the_config, set_training, write_values, replace_a_parameter),
        *(reshape_a_parameter, drop_a_bias, add_a_bias, change_the_tie, tie_layers, set_a_dtype),
        *(reparametrize, add_a_buffer, *PATCHES),
    )
}
