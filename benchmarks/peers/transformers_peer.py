"""transformers, not compiled, with its default attention and a cache that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from worker import Generate, Ids, Job

PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
SERVES_TOGETHER = False


def version() -> str:
    return f"{transformers.__version__}, torch {torch.__version__}"


def load(job: Job, **settings: Any) -> Generate:
    """`settings`: of `generate`, besides those that every request has."""
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.precision)
    model = transformers.GPT2LMHeadModel.from_pretrained(job.folder, dtype=dtype)
    model = model.to(job.device).eval()
    model.generation_config.eos_token_id = None  # never ends a row

    @torch.inference_mode()
    def generate(
        prompts: Ids, new_tokens: int, streamer: Streamer | None = None, **own: Any
    ) -> Ids:
        ids = torch.tensor(prompts, device=job.device)
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        options |= {**settings, **own}
        found = model.generate(ids, attention_mask=mask, streamer=streamer, **options)
        return found[:, ids.shape[1] :].tolist()

    return generate


class Streamer:
    """Hands one row's tokens on as they come; what comes first is the prompt."""

    def __init__(self, emit: Callable[[int], None]) -> None:
        self._emit, self._is_prompt = emit, True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self._emit(int(value.item()))
        self._is_prompt = False

    def end(self) -> None:
        pass


def serve(job: Job) -> Callable[[list[int], int, Callable[[int], None]], None]:
    """See token_server.py."""
    generate: Any = load(job)
    return lambda prompt, count, emit: generate([prompt], count, Streamer(emit))
