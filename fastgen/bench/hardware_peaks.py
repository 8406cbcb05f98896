"""HardwarePeaks: the limits of a model's device; MemoryWatch: the peak memory of a process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastgen.bench.interleave import spread
from fastgen.bench.peaks import Peak, Peaks
from fastgen.bench.roofline import Speeds
from fastgen.bench.shapes import Precision
from fastgen.decoders.machine import granted_cores
from fastgen.decoders.plan import DecoderPlan
from fastgen.native import native

Seconds = dict[str, float]  # of each peak's measurement

SETTLE = 0.01  # seconds in which the decoder's threads go to sleep
MOST_READ = 2**30  # bytes: more than caches hold


class HardwarePeaks:
    """Read bandwidth ("read") and kinds of arithmetic, measured repeatedly between other work.

    Without peaks there are no speeds.
    """

    def __init__(self, peaks: Mapping[str, Peak], precision: Precision) -> None:
        self._peaks, self._precision = peaks, precision
        self._seen: list[Seconds] = []

    def probe(self) -> Seconds:
        """Measure each once."""
        time.sleep(SETTLE)
        self._seen.append({name: peak.seconds() for name, peak in self._peaks.items()})
        return self._seen[-1]

    def speeds(self, before: Seconds, after: Seconds) -> Speeds | None:
        """The machine's, over two measurements of each."""
        if not self._peaks:
            return None
        each = {
            name: 2 * peak.amount / (before[name] + after[name])
            for name, peak in self._peaks.items()
        }
        precision = self._precision
        return Speeds(each["read"], each[precision.linear_peak], each[precision.attention_peak])

    def record(self) -> dict[str, Any]:
        """What was seen of each, in billions a second."""
        return {name: self._spread(name, peak) for name, peak in self._peaks.items()}

    def _spread(self, name: str, peak: Peak) -> dict[str, Any]:
        rates = [peak.amount / seconds[name] / 1e9 for seconds in self._seen]
        unit = "GB/s" if name == "read" else "G multiply-adds/s"
        return {**spread(rates, lambda rate: round(rate, 2)), "unit": unit, "how": peak.how}


@contextmanager
def limits_of(plan: DecoderPlan, precision: Precision, num_bytes: int) -> Iterator[HardwarePeaks]:
    """Those of the plan's device; none where they cannot be measured.

    `num_bytes` is what a step reads at least: caches that hold that much count as memory.
    """
    with _peaks_of(plan, precision, num_bytes) as peaks:
        yield HardwarePeaks(peaks, precision)


@contextmanager
def _peaks_of(plan: DecoderPlan, precision: Precision, num_bytes: int) -> Iterator[dict[str, Peak]]:
    if plan.device.startswith("cuda"):
        from fastgen.bench.cuda_peaks import cuda_peaks

        with cuda_peaks(plan.device, precision.peaks) as peaks:
            yield peaks
    elif plan.device.startswith("cpu") and native is not None:
        with Peaks(plan.num_threads or granted_cores(), min(num_bytes, MOST_READ)) as machine:
            kinds = {kind: machine.multiply_add(kind) for kind in precision.peaks}
            yield {"read": machine.read(), **kinds}
    else:
        yield {}


class MemoryWatch:
    """Bytes that this process has taken at most since this was made; of a GPU, PyTorch's."""

    def __init__(self) -> None:
        self._before = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        except OSError:
            self._before = 0

    def peak(self, device: str) -> int | None:
        """None where the system does not say."""
        if device.startswith("cuda"):
            from fastgen.bench.cuda_peaks import peak_bytes

            return peak_bytes(device)
        return _status("VmHWM") - self._before if self._before else None


def _status(name: str) -> int:
    """Bytes of one of Linux' figures about this process; 0 where there are none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
