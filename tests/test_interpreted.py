"""The tests of Triton kernels and of the CUDA decoder, in Triton's interpreter: no GPU is needed.

TRITON_INTERPRET has to be set before Triton is imported, so these run in processes of their own,
two at a time; a failure shows what they printed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GROUPS = (
    ("test_kernel_products.py", "test_kernel_attention.py", "test_kernel_sampling.py",
     "test_decoder_interface.py"),
    ("test_cuda_decoder.py", "test_run_ahead.py", "test_cuda_warmup.py"),
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.timeout(900)
def test_in_the_interpreter() -> None:
    run("not slow")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_more_in_the_interpreter() -> None:
    run("slow")


def run(chosen: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen]
    processes = [
        subprocess.Popen(
            [*command, *(str(TESTS / name) for name in group)],
            env=environment,
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for group in GROUPS
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        none_chosen = process.returncode == 5 and chosen == "slow"
        assert process.returncode == 0 or none_chosen, output[-20_000:]
        assert " passed" in output or none_chosen, output
