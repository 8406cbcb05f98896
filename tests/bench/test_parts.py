"""The benchmarks of the engine's parts run, and what they time comes out right: each once, untimed,
as `make bench` collects them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import processes

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

ROOT = Path(__file__).parents[2]
SUITES = sorted((ROOT / "benchmarks" / "parts").glob("bench_*.py"))
QUICK = ("bench_drafts", "bench_loading", "bench_scheduler", "bench_tokenizer")
OPTIONS = ("-o", "python_files=bench_*.py", "-o", "pythonpath=tests benchmarks")


def test_quick_suites() -> None:
    run([suite for suite in SUITES if suite.stem in QUICK])


@pytest.mark.slow
def test_slow_suites() -> None:
    """A checkpoint of 210 MB, and logits that come from a model."""
    run([suite for suite in SUITES if suite.stem not in QUICK])


def run(suites: list[Path]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OPTIONS]
    process = processes.run([*command, "--benchmark-disable", *suites], cwd=ROOT)
    assert suites and process.returncode == 0, process.stdout[-20_000:] + process.stderr
