"""Every variant of every Triton kernel compiles for each architecture, and fits."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

import processes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_every_variant_compiles_and_fits(architecture: str) -> None:
    """In a process of its own: compiling leaves a few hundred megabytes behind."""
    command = [sys.executable, str(SCRIPT), "--architectures", architecture]
    unset = {"TRITON_INTERPRET", "PYTHONSAFEPATH"}  # it imports what lies beside it
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    process = processes.run(command, env=environment)
    assert process.returncode == 0, process.stderr
    assert "0 wrong" in process.stdout.splitlines()[-1]
