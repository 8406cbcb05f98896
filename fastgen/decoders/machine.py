"""How many processors and how much memory this process may use, cgroups included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def granted_cores() -> int:
    """Processors this process may keep busy: its affinity mask, and its cgroup's CPU quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def free_memory() -> int:
    """Bytes of main memory that can still be had without swapping, for machine and cgroup."""
    free = _available_memory()
    for folder, limit_name, usage_name in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = _read(folder / limit_name), _read(folder / usage_name)
        if limit.isdigit() and usage.isdigit():
            used = int(usage) - _field(folder / "memory.stat", "inactive_file")  # droppable cache
            free = min(free, max(0, int(limit) - used))
    return free


def may_have_gpu() -> bool:
    """False only where no NVIDIA or AMD driver can be: a look at device files."""
    if sys.platform != "linux":
        return True
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu")))


def _available_memory() -> int:
    kilobytes = _field(Path("/proc/meminfo"), "MemAvailable:")
    if kilobytes:
        return kilobytes * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # no /proc: half of all


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of one "name number" a line; 0 where there is none."""
    for line in _read(path).splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
