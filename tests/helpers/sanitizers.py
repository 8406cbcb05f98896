"""C++ compiled with a sanitizer, and its programs, run until they have done, or found, enough."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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


def parts_of(sources: Path, *folders: str) -> list[Path]:
    return sorted(part for folder in folders for part in (sources / folder).glob("*.cpp"))


class Build:
    """Objects of one sanitizer, made once and fit for programs and for extensions; anew of what is
    changed.
    """

    def __init__(
        self, folder: Path, sources: Path, parts: Iterable[Path], flags: tuple[str, ...]
    ) -> None:
        self.folder, self.sources = folder, sources
        self.command = (compiler("g++"), *COMMON, "-fPIC", "-fvisibility=hidden", *flags)
        self.objects = self.compile(parts)

    def compile(
        self, parts: Iterable[Path], folder: Path | None = None, *flags: str
    ) -> dict[str, Path]:
        """Objects in `folder`, by the stems of their sources. Headers of `flags` go first."""

        def compiled(part: Path) -> tuple[str, Path]:
            made = (folder or self.folder) / f"{part.stem}.o"
            run(*self.command, *flags, f"-I{self.sources}", "-c", part, "-o", made)
            return part.stem, made

        with ThreadPoolExecutor(2) as pool:
            return dict(pool.map(compiled, parts))

    def program(self, driver: Path, changed: Path | None = None, *flags: str) -> Path:
        """The driver with these objects, but one of the changed source, beside which it is put."""
        folder = self.folder if changed is None else changed.parent
        objects = self.objects | self.compile([driver], folder)
        if changed is not None:
            objects |= self.compile([changed], folder, *flags)
        program = folder / driver.stem
        run(*self.command, *objects.values(), "-o", program)
        return program


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
