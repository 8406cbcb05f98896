"""Checkpoints of more than a GPT-2, or of one with a wrapper's names: refused by name, unless it is
known that GPT-2's part runs exactly without the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.models.gpt2 import modeling_gpt2

import fastgen
from stepping import all_logits
from tiny_checkpoints import (
    assert_loads,
    assert_refused,
    cases,
    load,
    random_array,
    random_tensors,
    write_checkpoint,
)
from variants import SMALL

# Tensors that one or another model has beside GPT-2's, in the files' own spelling.
FOREIGN = [
    "transformer.word_embeddings_layernorm.weight",
    "emb_norm.bias",
    "ln_emb.weight",
    "lm_head.bias",
    "wte.bias",
    "transformer.token_type_embeddings.weight",
    "transformer.h.0.ln_3.weight",
    "transformer.h.1.attn.q_norm.weight",
    "h.0.attn.rotary_emb.inv_freq",
    "h.0.attn.relative_attention_bias.weight",
    "h.0.mlp.gate_proj.weight",
    "h.0.mlp.experts.3.c_fc.weight",
    "h.1.ln_1.weight_scale",
    "h.x.ln_1.weight",
    "ln_f.running_mean",
    "soft_prompt",
    "scores",
    "v_head",
    "transformer.h.0.score.weight",
    "ln_f.bias\n",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_tensor_of_a_part_that_gpt2_does_not_have(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {**random_tensors(), name: random_array(8)})
    told = name.removeprefix("transformer.") if name.isprintable() else repr(name)
    assert_refused(tmp_path, "model.safetensors: tensor ", told, "is of no part that GPT-2 has")


@pytest.mark.parametrize("name", ["v_head.0.weight", "v_head.2.bias", "ilql_heads.v_head.0.bias"])
def test_value_heads_are_left_out(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {**random_tensors(), name: random_array(8)})
    with pytest.warns(UserWarning, match="1 tensors are not used: " + name):
        load(tmp_path).close()


HEADS = ["DoubleHeadsModel", "ForQuestionAnswering", "ForSequenceClassification",
         "ForTokenClassification"]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@torch.inference_mode()
def test_models_with_other_heads_continue_text_as_in_transformers(
    tmp_path: Path, head: str
) -> None:
    kind: Any = getattr(modeling_gpt2, f"GPT2{head}")
    torch.manual_seed(0)
    kind(modeling_gpt2.GPT2Config(**SMALL, summary_type="cls_index")).save_pretrained(tmp_path)
    ids = list(range(20))
    wanted = GPT2LMHeadModel.from_pretrained(tmp_path)(torch.tensor([ids])).logits[0]
    with (
        pytest.warns(UserWarning, match="tensors are not used"),
        fastgen.load(tmp_path, device="cpu") as model,
    ):
        found = all_logits(model.engine.decoder, [ids], [20])[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5 * float(wanted.abs().max()))


PREFIXES: dict[str, tuple[str, str, str]] = {
    # what stands before a name, what stands in the place of "h.", what is told
    "torch.compile": ("_orig_mod.", "h.", "'_orig_mod.' of torch.compile"),
    "compiled base": ("transformer._orig_mod.", "h.", "'_orig_mod.' of torch.compile"),
    "compiled blocks": ("transformer.", "h.{}._orig_mod.", "'_orig_mod.' of torch.compile"),
    "DDP": ("module.", "h.", "'module.' of DataParallel or DistributedDataParallel"),
    "DDP of a compiled one": ("module._orig_mod.transformer.", "h.", "'module.' of DataParallel"),
    "FSDP": ("_fsdp_wrapped_module.transformer.", "h.", "'_fsdp_wrapped_module.' of FSDP"),
    "checkpointing": ("", "h.{}._checkpoint_wrapped_module.", "of activation checkpointing"),
    "Lightning": ("model.transformer.", "h.", "'model.'"),
    "TRL": ("pretrained_model.transformer.", "h.", "'pretrained_model.'"),
    "twice": ("transformer.transformer.", "h.", "'transformer.'"),
    "unprintable": ("\x1b[2J.", "h.", r"\x1b[2J."),
    "endless": ("x" * 10**5 + ".", "h.", "xxx"),
}


@pytest.mark.parametrize(("before", "within", "told"), cases(PREFIXES))
@pytest.mark.parametrize("tied", [True, False])
def test_prefix_is_named(tmp_path: Path, before: str, within: str, told: str, tied: bool) -> None:
    """Also in the name of a tensor that would otherwise be missed first, such as the head."""

    def stored(name: str) -> str:
        first, _, rest = name.partition(".")
        if first == "h" and "{}" in within:
            layer, _, rest = rest.partition(".")
            return before + within.format(layer) + rest
        return before + name

    tensors = {stored(name): array for name, array in random_tensors().items()}
    write_checkpoint(tmp_path, tensors, tie_word_embeddings=tied)
    assert_refused(tmp_path, "model.safetensors: tensor ", "has the prefix ", told)


def test_gpt2s_own_prefix_is_none(tmp_path: Path) -> None:
    tensors = {f"transformer.{name}": array for name, array in random_tensors().items()}
    assert_loads(write_checkpoint(tmp_path, tensors))


OTHER_CODE: dict[str, tuple[Any, str]] = {
    "another model": (
        {"AutoConfig": "c.GPT2Config", "AutoModelForCausalLM": "modeling_x.XForCausalLM"},
        "names 'modeling_x.XForCausalLM' as its AutoModelForCausalLM",
    ),
    "another config": (
        {"AutoConfig": "configuration_x.XConfig"},
        "names 'configuration_x.XConfig'",
    ),
    "of another repository": ({"AutoModel": "a/b--modeling_x.X"}, "names 'a/b--modeling_x.X'"),
    "a longer name": ({"AutoModel": "m.MyGPT2Model"}, "names 'm.MyGPT2Model'"),
    "a module of that name": ({"AutoModel": "GPT2Model.X"}, "names 'GPT2Model.X'"),
    "no class": ({"AutoModel": None}, "names None"),
    "a list": ({"AutoModel": ["m.GPT2Model"]}, "names ['m.GPT2Model']"),
    "an unknown use": ({"AutoModelForX": "m.X"}, "as its AutoModelForX"),
    "no object": (["m.X"], "must be an object, not ['m.X']"),
}


@pytest.mark.parametrize(("auto_map", "cause"), cases(OTHER_CODE))
def test_auto_map_that_names_another_class(tmp_path: Path, auto_map: Any, cause: str) -> None:
    assert_refused(write_checkpoint(tmp_path, auto_map=auto_map), "config.json: auto_map ", cause)


@pytest.mark.parametrize("name", ["GPT2Config", *modeling_gpt2.__all__])
def test_auto_map_that_names_gpt2(tmp_path: Path, name: str) -> None:
    """Whatever class transformers has for GPT-2 itself, but the one that only others build on."""
    auto_map = {"AutoTokenizer": ["t.Slow", None], "AutoModel": f"modeling_gpt2.{name}"}
    write_checkpoint(tmp_path, auto_map=auto_map)
    if name == "GPT2PreTrainedModel":
        assert_refused(tmp_path, "auto_map names 'modeling_gpt2.GPT2PreTrainedModel'")
    else:
        assert_loads(tmp_path)


@pytest.mark.parametrize("auto_map", [None, {}])
def test_auto_map_that_names_nothing(tmp_path: Path, auto_map: Any) -> None:
    assert_loads(write_checkpoint(tmp_path, auto_map=auto_map))
