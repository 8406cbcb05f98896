"""The machine's peaks: bytes read and multiply-adds a second, measured in C++.

Reading: each thread its own buffer, with the widest loads; the fastest of a few simple ways is
chosen once. Multiply-adds: independent chains in registers alone, in float32, bfloat16 and int8, by
the instructions of one path of the decoder (the one that FASTGEN_ISA chooses, or another), which
are named; matrix units (AMX) are left out. What a kernel does once for several rows, as widening
weights, is not counted. A measurement takes about 60 milliseconds, so that it can stand between
those that it is to judge.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.bench.interleave import interleave_calls, median
from fastgen.native import native

KINDS = ("float32", "bfloat16", "int8")  # of multiply-adds
_WAYS = {"float32": (0,), "bfloat16": (0, 1), "int8": (2,)}  # by index in KINDS

_SECONDS = 0.06  # of one measurement
_TRIED_BYTES = 64_000_000  # read at least, to compare ways of reading: some milliseconds
_TRIED_ROUNDS = 1_000_000
_LEAST_BYTES = 65536  # of a thread's buffer: below, the loop itself would be measured
_PAGE = 4096


@dataclass(frozen=True)
class Peak:
    """One of the machine's limits.

    Attributes:
        how: the instruction, or the way of reading, that reaches it.
        amount: bytes or multiply-adds of one measurement.
        seconds: measures once.
    """

    how: str
    amount: float
    seconds: Callable[[], float]

    def measure(self) -> float:
        """Bytes or multiply-adds a second, now."""
        return self.amount / self.seconds()


class Peaks:
    """Measures with `num_threads` threads, each on a core of its own as far as there are enough.

    `read_bytes` is what all threads together read in one pass, over and over: caches that hold that
    much are what is measured, as they are what a model of that size is read from. Each thread reads
    64 KB at least. `path`, one of native.instruction_sets(), is whose instructions multiply; the
    one that decoders take without it. Raises MemoryError where there is not so much memory,
    ValueError for a path that this processor lacks, and RuntimeError without the C++ extension.
    """

    def __init__(self, num_threads: int, read_bytes: int, path: str = "") -> None:
        if native is None:
            raise RuntimeError(
                "the machine's limits are measured by fastgen's C++ extension, which was not "
                "built: install a C++ compiler and reinstall fastgen"
            )
        if num_threads < 1:
            raise ValueError("num_threads: must be at least 1")
        self._path = path or native.chosen_instruction_set()
        native.multipliers(self._path)
        usable = _usable_cores()
        self._cores = [usable[thread % len(usable)] for thread in range(num_threads)]
        bytes_each = max(_LEAST_BYTES, read_bytes // num_threads // _PAGE * _PAGE)
        self._pass_bytes = bytes_each * num_threads
        self._buffers: Any = native.PeakBuffers(self._cores, bytes_each)

    def __enter__(self) -> Peaks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the buffers back; what reads them raises RuntimeError from then on."""
        self._buffers = None

    def read(self) -> Peak:
        """Reading `read_bytes` over and over, in the way that is fastest here."""
        names = self._open().readers()
        passes = -(-_TRIED_BYTES // self._pass_bytes)
        tries = {name: partial(self._read, at, passes) for at, name in enumerate(names)}
        seconds = {name: median(taken) for name, taken in interleave_calls(tries, rounds=5).items()}
        how = min(seconds, key=seconds.__getitem__)
        times = max(1, round(_SECONDS * passes / seconds[how]))
        read = partial(self._read, names.index(how), times)
        return Peak(how, float(times * self._pass_bytes), read)

    def multiply_add(self, kind: str) -> Peak:
        """Multiply-adds of numbers of one of KINDS (others raise ValueError): by its own
        instruction; bfloat16's also widened to float32, where that is faster (Intel's vdpbf16ps is
        slower)."""
        if kind not in _WAYS:
            raise ValueError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
        ways = [self._multiply(index) for index in _WAYS[kind]]
        return max(ways, key=lambda way: median(way.measure() for _ in range(3)))

    def _multiply(self, index: int) -> Peak:
        how, macs = native.multipliers(self._path)[index]
        run = partial(native.multiply_seconds, self._cores, index, path=self._path)
        run(_TRIED_ROUNDS)
        seconds = median(run(_TRIED_ROUNDS) for _ in range(3)) / _TRIED_ROUNDS
        rounds = max(1, round(_SECONDS / seconds))
        return Peak(how, float(macs * rounds * len(self._cores)), partial(run, rounds))

    def _read(self, reader: int, times: int) -> float:
        seconds: float = self._open().read_seconds(reader, times)
        return seconds

    def _open(self) -> Any:
        if self._buffers is None:
            raise RuntimeError("these peaks have been closed")
        return self._buffers


def _usable_cores() -> list[int]:
    """One of each core's hardware threads first: so the system spreads a decoder's threads."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    usable = sorted(os.sched_getaffinity(0))
    seen: list[str] = []
    place = {}
    for core in usable:
        siblings = _siblings(core)
        place[core] = seen.count(siblings)
        seen.append(siblings)
    return sorted(usable, key=lambda core: (place[core], core))


def _siblings(core: int) -> str:
    """The hardware threads of the same core, as Linux tells them; else its own number."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(core)
