"""OpenVINO GenAI, its continuous batching; the model is exported by optimum-intel.

int8 is optimum-intel's 8-bit weights with bfloat16 arithmetic, the fastest of its ways here. Keys
and values are as OpenVINO chooses (8 bits), but where tokens are to be compared.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import openvino
import openvino_genai as genai
from worker import Generate, Ids, Job

PRECISIONS = ("float32", "bfloat16", "int8")
DEVICES = ("cpu",)
MODEL = "model"
SERVES_TOGETHER = True


def version() -> str:
    return str(genai.__version__)


def load(job: Job) -> Generate:
    pipeline = _open(job)

    def generate(prompts: Ids, new_tokens: int) -> Ids:
        tensors = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        found = pipeline.generate(tensors, [_greedy(new_tokens)] * len(tensors))
        return [list(result.m_generation_ids[0]) for result in found]

    return generate


def serve(job: Job) -> Callable[[list[int], int, Callable[[int], None]], None]:
    """See token_server.py: requests join the batch of a thread that steps."""
    pipeline, numbers = _open(job), itertools.count()
    work = threading.Event()

    def step() -> None:
        while True:
            work.wait()
            work.clear()
            while pipeline.has_non_finished_requests():
                pipeline.step()

    threading.Thread(target=step, daemon=True).start()

    def generate(prompt: list[int], count: int, emit: Callable[[int], None]) -> None:
        tensor = openvino.Tensor(np.array([prompt]))
        handle = pipeline.add_request(next(numbers), tensor, _greedy(count))
        work.set()
        left = count
        while left > 0:
            if not handle.can_read():
                time.sleep(5e-4)
                continue
            for output in handle.read().values():
                for token_id in output.generated_ids:
                    emit(int(token_id))
                    left -= 1

    return generate


def _greedy(new_tokens: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
    return config


def _cache_gigabytes(job: Job) -> int:
    """For all rows in full, in float32, so that none has to give way."""
    config = json.loads((job.folder / "config.json").read_text())
    token = 2 * config["n_layer"] * config["n_embd"] * 4
    return job.batch * job.max_len * token // 2**30 + 1


def _open(job: Job) -> genai.ContinuousBatchingPipeline:
    folder = str(job.scratch / MODEL)
    properties = {"INFERENCE_NUM_THREADS": job.threads}
    properties["INFERENCE_PRECISION_HINT"] = "f32" if job.precision == "float32" else "bf16"
    if job.exact:
        properties["KV_CACHE_PRECISION"] = "f32"
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = _cache_gigabytes(job)
    scheduling.max_num_seqs = job.batch
    scheduling.enable_prefix_caching = False
    tokenizer = genai.Tokenizer(folder)  # there is none; it would fail if it were used
    return genai.ContinuousBatchingPipeline(folder, tokenizer, scheduling, "CPU", **properties)


def convert(job: Job) -> None:
    from optimum.intel import OVModelForCausalLM

    options = {"export": True, "compile": False, "load_in_8bit": job.precision == "int8"}
    model = OVModelForCausalLM.from_pretrained(str(job.folder), **options)
    model.save_pretrained(str(job.scratch / MODEL))
