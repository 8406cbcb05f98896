"""What a reader needs to know of where numbers come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgen import __version__
from fastgen.decoders.machine import granted_cores
from fastgen.native import native

ROOT = Path(__file__).parents[2]  # of the checkout, if this is one
CODE = ("fastgen", "csrc", "kernels", "benchmarks/peers", "setup.py")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The processor, the system, and the versions of fastgen and of `packages`."""
    return {
        "cpu": _cpu_name(),
        "cores": granted_cores(),
        "caches": _caches(),
        "memory_gb": _memory_gb(),
        "features": native.cpu_features() if native is not None else [],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "fastgen": __version__,
        **{name: _version(name) for name in packages},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """Of the checkout that this runs from; "-dirty" where the code differs from it."""
    if not (ROOT / ".git").exists():
        return "unknown"
    name = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return (name or "unknown") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Sizes of the first core's data caches, some of which other cores share."""
    found = {}
    for index in sorted(_CACHES.glob("index*")) if _CACHES.exists() else []:
        if (index / "type").read_text().strip() != "Instruction":
            level, size = (index / name for name in ("level", "size"))
            found[f"L{level.read_text().strip()}"] = size.read_text().strip()
    return found


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
