"""C++ compiled with a sanitizer, and its programs, run until they have done, or found, enough."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parents[2]
INCLUDE = f"-I{ROOT / 'csrc'}"
POOL = ROOT / "csrc" / "common" / "thread_pool.cpp"
COMMON = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-pthread")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)


def compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Its output; fails with all of it where the command does."""
    process = processes.run(
        command,
        env={**os.environ, **(env or {})},
        stderr=subprocess.STDOUT,
        errors="replace",
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stdout[-8000:]
    return process.stdout


def counts(program: Path, seconds: int, pattern: str, least: tuple[int, ...]) -> list[int]:
    """What a driver says it has done, run over and over with new seeds until that is enough."""
    totals = [0] * len(least)
    while any(total < wanted for total, wanted in zip(totals, least, strict=True)):
        seed = str(int.from_bytes(os.urandom(3), "big"))
        print(f"{program.name} with seed {seed}")
        [found] = re.findall(pattern, run(program, str(seconds), seed))
        new = [found] if isinstance(found, str) else found
        totals = [total + int(count) for total, count in zip(totals, new, strict=True)]
    return totals


def failure(program: Path, seconds: int) -> str:
    """What it says when it fails, run over and over until it does."""
    for seed in itertools.count(1):
        process = processes.run([program, str(seconds), str(seed)], errors="replace")
        if process.returncode != 0:
            return process.stderr
    raise AssertionError
