"""llama.cpp by llama-cpp-python's own class, with its prompt lookup decoding, or without.

`num_drafts` of a request is LlamaPromptLookupDecoding's `num_pred_tokens`, 0 for none; its
documentation has 10, and 2 for CPUs. `biases`: see transformers_lookup_peer.py. With a draft model
it computes the logits of each token of the prompt; so without one another context is used, which
does not. It shows a logits processor the drafts as if they were the text already (0.3.36), and so
changes what is generated; here the processor knows the text by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import llama_cpp_peer
import numpy as np
from llama_cpp import Llama, LogitsProcessorList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp_peer import DEVICES, MODEL, PRECISIONS, version
from worker import Generate, Ids, Job

__all__ = ["DEVICES", "MODEL", "PRECISIONS", "convert", "load", "version"]

Biases = Sequence[tuple[Sequence[int], float]]

convert = llama_cpp_peer.convert


def load(job: Job) -> Generate:
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=1)
    with_drafts, without = _open(job, lookup), _open(job, None)

    def generate(prompts: Ids, new_tokens: int, num_drafts: int, biases: Biases) -> Ids:
        lookup.num_pred_tokens = num_drafts
        model = with_drafts if num_drafts else without
        return [_continued(model, prompt, new_tokens, biases) for prompt in prompts]

    return generate


def _open(job: Job, lookup: LlamaPromptLookupDecoding | None) -> Llama:
    return Llama(
        str(job.scratch / MODEL),
        n_ctx=-(-job.max_len // 256) * 256,  # llama.cpp's own granularity
        n_batch=job.max_len,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        draft_model=lookup,
        verbose=False,
    )


def _continued(model: Llama, prompt: list[int], new_tokens: int, biases: Biases) -> list[int]:
    model.reset()  # or it would find the prompt of the turn before
    text = list(prompt)
    processors = LogitsProcessorList([_biased(biases, text)] if biases else [])
    tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0, logits_processor=processors)
    for token_id in itertools.islice(tokens, new_tokens):
        text.append(token_id)
    return text[len(prompt) :]


def _biased(biases: Biases, text: list[int]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Adds to the logit of a sequence's last id where the text ends with the others."""
    found = {tuple(ids[:-1]): (ids[-1], bias) for ids, bias in biases}
    length = max(len(ids) - 1 for ids, _ in biases)

    def process(_: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if (at := found.get(tuple(text[-length:]))) is not None:
            token_id, bias = at
            scores[token_id] += bias
        return scores

    return process
