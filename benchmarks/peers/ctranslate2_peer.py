"""CTranslate2, its model written from the checkpoint as its own converter for GPT-2 does.

Its CPU build has float32 and int8 arithmetic; the vocabulary is the ids as text. With int8 two
threads are two workers that share the rows, which is faster at every batch tried; else there is one
worker, since one row is slower on half the threads.
"""

from __future__ import annotations

import json
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from safetensors.numpy import load_file
from worker import Generate, Ids, Job

PRECISIONS = ("float32", "int8")
DEVICES = ("cpu",)
MODEL = "model"

Tensors = dict[str, np.ndarray[Any, Any]]


def version() -> str:
    return str(ctranslate2.__version__)


def load(job: Job) -> Generate:
    workers = 2 if job.precision == "int8" and job.threads == 2 else 1
    model = ctranslate2.Generator(
        str(job.scratch / MODEL),
        device=job.device,
        compute_type=job.precision,
        inter_threads=workers,
        intra_threads=job.threads // workers,
    )

    def generate(prompts: Ids, new_tokens: int) -> Ids:
        found = model.generate_batch(
            [[str(token_id) for token_id in prompt] for prompt in prompts],
            max_batch_size=-(-len(prompts) // workers),
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in found]

    return generate


def convert(job: Job) -> None:
    config = json.loads((job.folder / "config.json").read_text())
    tensors = load_file(job.folder / "model.safetensors")
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"],
        config["n_head"],
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = tensors["wte.weight"]
    decoder.position_encodings.encodings = tensors["wpe.weight"]
    decoder.projection.weight = tensors.get("lm_head.weight", tensors["wte.weight"])
    _set_norm(decoder.layer_norm, tensors, "ln_f")
    for index, layer in enumerate(decoder.layer):
        attention = layer.self_attention
        _set_norm(attention.layer_norm, tensors, f"h.{index}.ln_1")
        _set_linear(attention.linear[0], tensors, f"h.{index}.attn.c_attn")
        _set_linear(attention.linear[1], tensors, f"h.{index}.attn.c_proj")
        _set_norm(layer.ffn.layer_norm, tensors, f"h.{index}.ln_2")
        _set_linear(layer.ffn.linear_0, tensors, f"h.{index}.mlp.c_fc")
        _set_linear(layer.ffn.linear_1, tensors, f"h.{index}.mlp.c_proj")
    vocabulary = [str(token_id) for token_id in range(config["vocab_size"])]
    spec.register_vocabulary(vocabulary)
    last = vocabulary[config["eos_token_id"]]
    spec.config.layer_norm_epsilon = config.get("layer_norm_epsilon", 1e-5)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = last
    spec.validate()
    spec.optimize(quantization=None if job.precision == "float32" else job.precision)
    folder = job.scratch / MODEL
    folder.mkdir()
    spec.save(str(folder))


def _set_norm(spec: Any, tensors: Tensors, name: str) -> None:
    spec.gamma, spec.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def _set_linear(spec: Any, tensors: Tensors, name: str) -> None:
    spec.weight = np.ascontiguousarray(tensors[f"{name}.weight"].T)  # (in, out) -> (out, in)
    spec.bias = tensors[f"{name}.bias"]
