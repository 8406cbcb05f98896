"""A fresh process's memory: before a model is loaded, after, and with all contexts filled.

    python benchmarks/resident_memory.py FOLDER '{"quantize": "int8"}'

Prints JSON, in bytes: what was resident before, the peaks since, and what the plan says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import fastgen

NEW = 16  # tokens generated after prompts that fill the rest of the context


def status(name: str) -> int:
    """Bytes of one of the kernel's figures about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def main() -> None:
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    load = fastgen.load  # imports what it needs
    seen = {"before": status("VmRSS")}
    with load(folder, **options) as model:
        seen["loaded"] = status("VmHWM")
        seen["planned"] = model.plan.memory.total
        limits = model.plan.limits
        size = (limits.num_seats, limits.max_seq_len - NEW)
        prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, size).tolist()
        model.generate(prompts, max_new_tokens=NEW, ignore_eos=True, temperature=0)
        seen["filled"] = status("VmHWM")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
