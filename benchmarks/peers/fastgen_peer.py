"""fastgen itself, whole calls of `generate`."""

from __future__ import annotations

from worker import Generate, Ids, Job

import fastgen

PRECISIONS = ("float32", "bfloat16", "int8")  # as Job.load says
DEVICES = ("cpu", "cuda")


def version() -> str:
    return fastgen.__version__


def load(job: Job) -> Generate:
    model = fastgen.load(
        job.folder,
        device=job.device,
        num_threads=job.threads,
        max_batch_size=job.batch,
        max_seq_len=job.max_len,
        cache=False,  # each run has a checkpoint of its own
        speculate="off",  # random weights repeat themselves: guesses would look splendid
        **job.load,
    )

    def generate(prompts: Ids, new_tokens: int) -> Ids:
        options = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        found = model.generate(prompts, **options)
        return [list(generation.completions[0].token_ids) for generation in found]

    return generate
