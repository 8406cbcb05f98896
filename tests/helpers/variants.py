"""One small random checkpoint per GPT-2 variant, saved by transformers itself.

Weights are drawn large enough that logits are far from flat and every part of the model matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

SMALL = {"vocab_size": 211, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4,
         "bos_token_id": 5, "eos_token_id": 7}  # fmt: skip

Edit = Callable[[Path], None]


def random_model(seed: int, **options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                tensor.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.1)
            else:  # keeps activations of order one at any width
                tensor.normal_(0.0, 1.2 * tensor.shape[0 if "c_" in name else 1] ** -0.5)
    return model


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def _without_prefix(folder: Path) -> None:
    _edit_tensors(folder, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})


def _with_mask_buffers(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in range(SMALL["n_layer"]):
            mask = torch.tril(torch.ones(96, 96, dtype=torch.uint8))[None, None]
            tensors[f"transformer.h.{layer}.attn.bias"] = mask
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    _edit_tensors(folder, edit)


def _swapped(folder: Path) -> None:
    """Only a head is stored; the embedding is tied to it."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {("lm_head.weight" if "wte" in k else k): v for k, v in tensors.items()}

    _edit_tensors(folder, edit)


def _both_tied(folder: Path) -> None:
    _edit_tensors(folder, lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()})


def _both_different(folder: Path) -> None:
    """tie_word_embeddings is true, yet a head of its own is stored."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].flip(0).contiguous()}

    _edit_tensors(folder, edit)


def _general_names(folder: Path) -> None:
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads",
             "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings"}  # fmt: skip
    _edit_config(folder, lambda c: {names.get(key, key): value for key, value in c.items()})


def _value_head(folder: Path) -> None:
    extra = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    _edit_tensors(folder, lambda t: {**t, **extra})


def _fewer_layers(folder: Path) -> None:
    """config.json speaks of the first two of three."""
    _edit_config(folder, lambda c: {**c, "n_layer": 2})


def _extra_config_keys(folder: Path) -> None:
    """As old and foreign configs have them; n_ctx is no longer read by anybody."""
    _edit_config(folder, lambda c: {**c, "n_ctx": 17, "torch_dtype": "float32", "gradient": False})


ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu",
               "relu", "sigmoid", "silu", "swish", "tanh")  # fmt: skip

# name -> (config options, what is done to the saved folder, dtype of the file)
VARIANTS: dict[str, tuple[dict[str, Any], Edit | None, torch.dtype]] = {
    "plain": ({}, None, torch.float32),
    "one_layer": ({"n_layer": 1}, None, torch.float32),
    "no_prefix": ({}, _without_prefix, torch.float32),
    "mask_buffers": ({}, _with_mask_buffers, torch.float32),
    "untied": ({"tie_word_embeddings": False}, None, torch.float32),
    "swapped_head": ({}, _swapped, torch.float32),
    "both_heads_equal": ({}, _both_tied, torch.float32),
    "both_heads_differ": ({}, _both_different, torch.float32),
    "sharded": ({}, None, torch.float32),
    "fp16_file": ({}, None, torch.float16),
    "bf16_file": ({}, None, torch.bfloat16),
    "n_inner": ({"n_inner": 72}, None, torch.float32),
    "unscaled": ({"scale_attn_weights": False}, None, torch.float32),
    "inverse_layer": ({"scale_attn_by_inverse_layer_idx": True}, None, torch.float32),
    "codeparrot": (
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        None,
        torch.float32,
    ),
    "epsilon": ({"layer_norm_epsilon": 1e-2}, None, torch.float32),
    "odd_vocab": ({"vocab_size": 1003}, None, torch.float32),
    "head_dim_1": ({"n_embd": 4, "n_head": 4}, None, torch.float32),
    "head_dim_8": ({"n_embd": 24, "n_head": 3}, None, torch.float32),
    "head_dim_80": ({"n_embd": 160, "n_head": 2}, None, torch.float32),
    "head_dim_128": ({"n_embd": 256, "n_head": 2}, None, torch.float32),
    "width_36": ({"n_embd": 36, "n_head": 3}, None, torch.float32),
    "width_100": ({"n_embd": 100, "n_head": 4, "n_inner": 37}, None, torch.float32),
    "gpt2_vocab": (
        {"n_layer": 1, "n_embd": 20, "n_head": 2, "vocab_size": 50257},
        None,
        torch.float32,
    ),
    "one_of_each": (
        {"n_layer": 1, "n_head": 1, "n_embd": 3, "vocab_size": 13},
        None,
        torch.float32,
    ),
    "general_names": ({}, _general_names, torch.float32),
    "value_head": ({}, _value_head, torch.float32),
    "fewer_layers": ({}, _fewer_layers, torch.float32),
    "extra_config_keys": ({}, _extra_config_keys, torch.float32),
    **{f"act_{name}": ({"activation_function": name}, None, torch.float32) for name in ACTIVATIONS},
}


def save_variant(name: str, folder: Path) -> Path:
    options, edit, dtype = VARIANTS[name]
    model = random_model(sum(map(ord, name)), **options).to(dtype)
    shards = {"max_shard_size": "30KB"} if name == "sharded" else {}
    model.save_pretrained(folder, **shards)
    if edit is not None:
        edit(folder)
    return folder
