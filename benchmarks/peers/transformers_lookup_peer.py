"""transformers with its prompt lookup decoding, or without: the request says which.

`num_drafts` is its `prompt_lookup_num_tokens`, 0 for none. One prompt at a time; more are refused
by transformers. `biases` are those of a `sequence_bias`, ((ids, bias), ...); transformers' own
processor compares each with the text by PyTorch calls, which would be most of the time, so they are
looked up here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers_peer
from transformers import LogitsProcessor, LogitsProcessorList
from transformers_peer import DEVICES, PRECISIONS, version
from worker import Generate, Ids, Job

__all__ = ["DEVICES", "PRECISIONS", "load", "version"]

Biases = Sequence[tuple[Sequence[int], float]]


def load(job: Job) -> Generate:
    plain = transformers_peer.load(job)

    def generate(prompts: Ids, new_tokens: int, num_drafts: int, biases: Biases) -> Ids:
        processors = LogitsProcessorList([Biased(biases)] if biases else [])
        lookup = {"prompt_lookup_num_tokens": num_drafts} if num_drafts else {}
        return plain(prompts, new_tokens, logits_processor=processors, **lookup)

    return generate


class Biased(LogitsProcessor):
    """Adds to the logit of a sequence's last id where the text ends with the others."""

    def __init__(self, biases: Biases) -> None:
        self._found = {tuple(ids[:-1]): (ids[-1], bias) for ids, bias in biases}
        self._length = max(len(ids) - 1 for ids, _ in biases)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, -self._length :].tolist()):
            if (found := self._found.get(tuple(ids))) is not None:
                token_id, bias = found
                scores[row, token_id] += bias
        return scores
