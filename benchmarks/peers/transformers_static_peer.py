"""transformers with a static cache and the decoding step compiled."""

from __future__ import annotations

import transformers
import transformers_peer
from transformers_peer import DEVICES, PRECISIONS, version
from worker import Generate, Job

__all__ = ["DEVICES", "PRECISIONS", "load", "version"]


def load(job: Job) -> Generate:
    compiling = transformers.CompileConfig(fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True  # else a CPU is passed over
    return transformers_peer.load(job, cache_implementation="static", compile_config=compiling)
