"""Reading a checkpoint takes the memory of about two of its tensors, whatever the size of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_checkpoints import CONFIG, random_array, random_tensors, run_python, write_checkpoint

STATUS = Path("/proc/self/status")
# Six tensors of equal size, the head of its own among them, and one of a third of it.
CONFIG_64_MB = {
    **CONFIG,
    "n_layer": 1,
    "n_embd": 944,
    "n_inner": 3 * 944,
    "vocab_size": 3 * 944,
    "n_positions": 3 * 944,
}
TENSOR_MB = 3 * 944 * 944 * 4 / 2**20

_READ = """
import sys
import numpy as np
from fastgen.checkpoints.checkpoint import open_checkpoint

def status_mb(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def read_all(folder):
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.tied
    return sum(checkpoint.read(name).size for name, _ in checkpoint.tensors())

read_all(sys.argv[1])  # imports, and whatever else is paid once
before = status_mb("VmRSS")
values = read_all(sys.argv[2])
print(values * 4 / 2**20, status_mb("VmHWM") - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_reading_keeps_at_most_two_tensors_in_memory(tmp_path: Path) -> None:
    small = {**random_tensors(), "lm_head.weight": random_array(11, 8) + 1}
    large = random_tensors(CONFIG_64_MB)
    large["lm_head.weight"] = large["wte.weight"] + 1
    write_checkpoint(tmp_path / "small", small)
    write_checkpoint(tmp_path / "large", large, **CONFIG_64_MB)
    output = run_python(_READ, tmp_path / "small", tmp_path / "large")
    file_mb, peak_mb = map(float, output.split())
    assert file_mb > 60
    assert peak_mb < 2.5 * TENSOR_MB + 4, f"{peak_mb:.1f} MB for tensors of {TENSOR_MB:.1f} MB"
