"""llama.cpp through its C batch API: every row a sequence, one llama_decode a step.

The GGUF is written from the checkpoint, without a vocabulary: F32, BF16, or Q8_0 for int8. Keys and
values are float16 with all of them, llama.cpp's default: its flash attention, which it takes by
itself, is slow on float32 ones. What draws tokens (NumPy, its own greedy sampler, or one in its
graph) and the physical batch make no difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version as version_of

import gguf
import llama_cpp as api
import numpy as np
from safetensors.numpy import load_file
from worker import Generate, Ids, Job

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}
PRECISIONS = tuple(_TYPES)
DEVICES = ("cpu",)
MODEL = "model.gguf"
SERVES_TOGETHER = False
_NAMES = {  # of GPT-2's parameters in a GGUF
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def version() -> str:
    return f"of llama-cpp-python {version_of('llama-cpp-python')}"


def load(job: Job) -> Generate:
    return _open(job).generate


def serve(job: Job) -> Callable[[list[int], int, Callable[[int], None]], None]:
    """See token_server.py. Under a lock, as llama-cpp-python's own server has it."""
    session = _open(job)

    def generate(prompt: list[int], count: int, emit: Callable[[int], None]) -> None:
        session.generate([prompt], count, lambda drawn: emit(drawn[0]))

    return generate


def _open(job: Job) -> Session:
    api.llama_backend_init()
    path = str(job.scratch / MODEL).encode()
    model = api.llama_model_load_from_file(path, api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = job.batch * (-(-job.max_len // 256) * 256)  # llama.cpp's own granularity
    params.n_batch = job.batch * job.max_len
    params.n_seq_max = job.batch
    params.n_threads = params.n_threads_batch = job.threads
    params.no_perf = True
    if job.exact:
        params.type_k = params.type_v = int(_TYPES[job.precision])
    context = api.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return Session(context, vocab_size, params.n_batch, job.batch)


class Session:
    """One context, and the batch through which tokens go in."""

    def __init__(self, context: int, vocab_size: int, room: int, rows: int) -> None:
        self._context, self._vocab_size = context, vocab_size
        self._batch = api.llama_batch_init(room, 0, rows)

    def generate(
        self, prompts: Ids, new_tokens: int, on_step: Callable[[list[int]], None] = lambda ids: None
    ) -> Ids:
        """`on_step` gets a token of each row."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        found: Ids = [[] for _ in prompts]
        new: Sequence[Sequence[int]] = prompts
        cached = [0] * len(prompts)
        for _ in range(new_tokens):
            drawn = self._step(new, cached)
            on_step(drawn)
            cached = [before + len(tokens) for before, tokens in zip(cached, new, strict=True)]
            new = [[token] for token in drawn]
            for row, token in zip(found, drawn, strict=True):
                row.append(token)
        return found

    def _step(self, new: Sequence[Sequence[int]], cached: Sequence[int]) -> list[int]:
        batch, count, last = self._batch, 0, []
        for row, tokens in enumerate(new):
            for offset, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = cached[row] + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._highest(index) for index in last]

    def _highest(self, index: int) -> int:
        logits = api.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def convert(job: Job) -> None:
    config = json.loads((job.folder / "config.json").read_text())
    writer = gguf.GGUFWriter(job.scratch / MODEL, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(job.folder / "model.safetensors").items():
        matrix = tensor.ndim == 2 and not name.startswith("wpe")
        values = tensor.T if matrix and name.startswith("h.") else tensor  # rows of outputs
        used = _TYPES[job.precision] if matrix else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(values), used)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        return f"blk.{layer}.{_NAMES[module]}.{kind}"
    return f"{_NAMES[module]}.{kind}"
