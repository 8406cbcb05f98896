"""fastgen itself, whole calls of `generate`."""

from __future__ import annotations

from worker import Generate, Ids, Job

import fastgen

_LOAD = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}
PRECISIONS = tuple(_LOAD)
DEVICES = ("cpu", "cuda")


def version() -> str:
    return fastgen.__version__


def load(job: Job) -> Generate:
    model = fastgen.load(
        job.folder,
        device=job.device,
        decoder=job.decoder,
        num_threads=job.threads,
        max_batch_size=job.batch,
        max_seq_len=job.max_len,
        **_LOAD[job.precision],
    )

    def generate(prompts: Ids, new_tokens: int) -> Ids:
        options = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        found = model.generate(prompts, **options)
        return [list(generation.completions[0].token_ids) for generation in found]

    return generate
