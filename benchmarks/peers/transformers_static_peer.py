"""transformers with a static cache and the decoding step compiled, as its documentation has it.

`generate` compiles by itself with a static cache, the prefill excepted, but passes a CPU over
unless `_compile_all_devices` is set. On a CPU it helps some with float32 and with several rows; a
single row in bfloat16 is no faster than without. Each new shape is compiled when it first comes.
Inductor's freezing must stay off: it takes the place in the cache for a constant.
"""

from __future__ import annotations

import transformers
import transformers_peer
from transformers_peer import DEVICES, PRECISIONS, version
from worker import Generate, Job

__all__ = ["DEVICES", "PRECISIONS", "load", "version"]


def load(job: Job) -> Generate:
    config = transformers.CompileConfig()
    config._compile_all_devices = True
    return transformers_peer.load(job, cache_implementation="static", compile_config=config)
