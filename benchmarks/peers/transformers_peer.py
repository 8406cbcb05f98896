"""transformers, not compiled, with its default attention."""

from __future__ import annotations

import torch
import transformers
from worker import Generate, Ids, Job

PRECISIONS = ("float32", "bfloat16")


def version() -> str:
    return f"{transformers.__version__}, torch {torch.__version__}"


def load(job: Job) -> Generate:
    torch.set_num_threads(job.threads)
    dtype = getattr(torch, job.precision)
    model = transformers.GPT2LMHeadModel.from_pretrained(job.folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # never ends a row

    @torch.inference_mode()
    def generate(prompts: Ids, new_tokens: int) -> Ids:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=mask, **options)
        return found[:, ids.shape[1] :].tolist()

    return generate
