"""What this machine can do at most, measured natively: bytes read and multiply-adds a second.

    python benchmarks/peaks.py [--threads 2] [--rounds 9]

Reading: each thread its own buffer, together far above the last cache, with the widest loads; the
fastest of a few simple ways is chosen once. Multiply-adds: independent chains in registers alone,
in float32, bfloat16 and int8; where the processor lacks an instruction, the next best one, by name.
A measurement takes about 60 milliseconds, so that it can stand between those that it is to judge.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness

KINDS = ("float32", "bfloat16", "int8")  # of multiply-adds
READ_BYTES = 400_000_000
SECONDS = 0.06  # of one measurement
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]


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
    """Measures with `num_threads` threads, each on a core of its own as far as there are enough."""

    def __init__(self, num_threads: int, read_bytes: int = READ_BYTES) -> None:
        self._library = _compiled()
        cores = sorted(os.sched_getaffinity(0))
        self._num_threads = num_threads
        self._cores = (ctypes.c_int * num_threads)(
            *(cores[thread % len(cores)] for thread in range(num_threads))
        )
        self._bytes_each = read_bytes // num_threads // 64 * 64
        self._buffers = self._library.buffers_new(self._cores, num_threads, self._bytes_each)
        if not self._buffers:
            raise MemoryError(f"no {read_bytes} bytes to read")

    def read(self) -> Peak:
        """Reading from memory, in the way that is fastest here."""
        readers = range(self._library.reader_count())
        once = {str(reader): partial(self._read, reader, 1) for reader in readers}
        seconds = harness.take_turns(once, rounds=5)
        best = min(seconds, key=lambda name: harness.median(seconds[name]))
        times = max(1, round(SECONDS / harness.median(seconds[best])))
        how = self._library.reader_name(int(best)).decode()
        amount = float(times * self._bytes_each * self._num_threads)
        return Peak(how, amount, partial(self._read, int(best), times))

    def multiply_add(self, kind: str) -> Peak:
        """Multiply-adds of one of KINDS."""
        index, rounds = KINDS.index(kind), 1_000_000
        run = partial(self._library.multiply_seconds, self._cores, self._num_threads, index)
        run(rounds)
        rounds = max(1, round(rounds * SECONDS / harness.median([run(rounds) for _ in range(3)])))
        macs = self._library.multiplier_macs(index) * rounds * self._num_threads
        how = self._library.multiplier_name(index).decode()
        return Peak(how, float(macs), partial(run, rounds))

    def close(self) -> None:
        """Give the buffers back."""
        self._library.buffers_delete(self._buffers)
        self._buffers = None

    def _read(self, reader: int, times: int) -> float:
        seconds: float = self._library.read_seconds(self._buffers, reader, times)
        return seconds


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peaks.so"
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(path)], check=True)
        return _declared(ctypes.CDLL(str(path)))  # stays mapped after the file has gone


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    cores, integer, pointer = ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_void_p
    types = {
        "reader_count": (integer, []),
        "reader_name": (ctypes.c_char_p, [integer]),
        "buffers_new": (pointer, [cores, integer, ctypes.c_size_t]),
        "buffers_delete": (None, [pointer]),
        "read_seconds": (ctypes.c_double, [pointer, integer, integer]),
        "multiplier_name": (ctypes.c_char_p, [integer]),
        "multiplier_macs": (integer, [integer]),
        "multiply_seconds": (ctypes.c_double, [cores, integer, integer, ctypes.c_int64]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    machine = Peaks(arguments.threads)
    peaks = {"read": machine.read(), **{kind: machine.multiply_add(kind) for kind in KINDS}}
    measures = {name: peak.seconds for name, peak in peaks.items()}
    seconds = harness.take_turns(measures, rounds=arguments.rounds)
    for name, peak in peaks.items():
        speeds = sorted(peak.amount / value / 1e9 for value in seconds[name])
        unit = "GB/s" if name == "read" else "G multiply-adds/s"
        spread = f"{speeds[0]:.1f} to {speeds[-1]:.1f}"
        print(f"{name:9} {harness.median(speeds):7.1f} {unit}, {spread} ({peak.how})")
    machine.close()


if __name__ == "__main__":
    main()
