"""The machine's limits as measured in C++: that they are measured, not how high they are."""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import processes
from cpu_decoders import INSTRUCTION_SETS, instruction_set
from fastgen.bench import peaks
from fastgen.bench.peaks import KINDS, Peak, Peaks
from fastgen.native import native

pytestmark = pytest.mark.skipif(native is None, reason="the C++ extension is not built")

HOWS = {  # the features, by Linux' names, that each way of multiplying needs
    "AVX-512 FMA": {"avx512f"},
    "AVX-512 vdpbf16ps": {"avx512f", "avx512_bf16"},
    "AVX-512 vpdpbusd": {"avx512f", "avx512_vnni"},
    "AVX-512 vpmaddwd, vpaddd": {"avx512f"},
    "AVX vpdpbusd": {"avx2", "avx_vnni"},
    "AVX2 FMA": {"avx2", "fma"},
    "AVX2 vpsignb, vpmaddubsw, vpmaddwd, vpaddd": {"avx2"},
    "NEON multiply and add": {"asimd"},
    "NEON bfmlalb": {"asimd", "bf16"},
    "NEON smmla": {"asimd", "i8mm"},
    "NEON sdot": {"asimd", "asimddp"},
    "NEON smull, addp, sadalp": {"asimd"},
    "plain multiply and add": set(),
}

FORK = """
import os
from fastgen.native import native
buffers = native.PeakBuffers([0, 0], 65536)
buffers.read_seconds(0, 1)

def measure():
    print(buffers.read_seconds(0, 2), native.multiply_seconds([0, 0], 2, 10), flush=True)

pid = os.fork()
if pid == 0:
    measure()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
measure()
"""


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a millisecond."""
    monkeypatch.setattr(peaks, "_SECONDS", 0.001)
    monkeypatch.setattr(peaks, "_TRIED_BYTES", 4_000_000)
    monkeypatch.setattr(peaks, "_TRIED_ROUNDS", 10_000)


@pytest.mark.parametrize(
    ("num_threads", "read_bytes", "bytes_each"),
    [
        (1, 0, 65536),
        (2, 1000, 65536),
        (1, 1_000_000, 999_424),
        (3, 10_000_000, 3_330_048),
    ],
)
def test_read(num_threads: int, read_bytes: int, bytes_each: int, brief: None) -> None:
    with Peaks(num_threads, read_bytes) as machine:
        peak = machine.read()
        assert peak.amount > 0 and peak.amount % (bytes_each * num_threads) == 0
        assert peak.how in native.PeakBuffers([0], 512).readers()
        assert is_positive(peak.seconds()) and is_positive(peak.measure())


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_multiply_add(kind: str, num_threads: int, brief: None) -> None:
    """Its own instruction's; bfloat16's may be float32's."""
    path = native.chosen_instruction_set()
    found = dict(zip(KINDS, native.multipliers(path), strict=True))
    ways = dict([found[kind]] if kind != "bfloat16" else [found["float32"], found[kind]])
    with Peaks(num_threads, 0) as machine:
        peak = machine.multiply_add(kind)
    assert peak.amount > 0 and peak.amount % (ways[peak.how] * num_threads) == 0
    assert is_positive(peak.seconds()) and is_positive(peak.measure())


def test_a_peak_divides_its_amount_by_its_seconds() -> None:
    assert Peak("so", 6.0, lambda: 2.0).measure() == 3.0


def test_every_reader_reads() -> None:
    buffers = native.PeakBuffers([0, 0], 512)
    assert len(set(buffers.readers())) == len(buffers.readers()) == 8
    for reader in range(8):
        assert is_positive(buffers.read_seconds(reader, 3))


@pytest.mark.parametrize("path", INSTRUCTION_SETS)
def test_multipliers_are_a_paths_own(path: str) -> None:
    found, has = native.multipliers(path), set(native.cpu_features())
    assert len(found) == len(KINDS)
    for how, macs in found:
        assert HOWS[how] <= has and macs > 0
    (float32, _), (bfloat16, _), (int8, _) = found
    assert (float32 == "AVX-512 FMA") == path.startswith("avx512")
    assert (bfloat16 == "AVX-512 vdpbf16ps") == (path == "avx512_bf16")
    assert ("vpdpbusd" in int8) == (path in ("avx512_bf16", "avx512_vnni", "avx_vnni"))
    assert ("vpmaddwd" in int8) == (path in ("avx512", "avx2"))


@pytest.mark.parametrize("path", INSTRUCTION_SETS)
def test_peaks_are_those_of_the_path_that_decoders_take(path: str, brief: None) -> None:
    with instruction_set(path), Peaks(1, 0) as machine:
        how = machine.multiply_add("int8").how
    assert how == native.multipliers(path)[KINDS.index("int8")][0]
    with Peaks(1, 0, path) as machine:
        assert machine.multiply_add("int8").how == how


def test_a_path_that_the_processor_lacks() -> None:
    for call in (lambda: native.multipliers("sse17"), lambda: Peaks(1, 0, "sse17")):
        with pytest.raises(ValueError, match="sse17"):
            call()
    with pytest.raises(ValueError, match="sse17"):
        native.multiply_seconds([0], 0, 1, path="sse17")


def test_features_have_linux_names() -> None:
    """What an older kernel does not know, it leaves out."""
    if not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64":
        pytest.skip("no list of an x86 processor's features here")
    flags = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    known = {"avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"}
    assert known & set(flags[0].split()) <= set(native.cpu_features()) <= known


def test_unnamed_multipliers_are_the_processors_best_whatever_the_decoder_is_told() -> None:
    code = "from fastgen.native import native; print(native.multipliers())"
    environment = {**os.environ, "FASTGEN_ISA": "portable"}
    command = [sys.executable, "-c", code]
    process = processes.run(command, env=environment)
    assert process.stdout.strip() == str(native.multipliers()), process.stderr


@pytest.mark.parametrize(
    ("cores", "bytes_each"), [([], 512), ([-1], 512), ([0], 0), ([0], -512), ([0], 100)]
)
def test_bad_buffers(cores: list[int], bytes_each: int) -> None:
    with pytest.raises(ValueError, match=r"cores|bytes_each"):
        native.PeakBuffers(cores, bytes_each)


def test_more_memory_than_there_is() -> None:
    with pytest.raises(MemoryError):
        native.PeakBuffers([0], 2**62)
    with pytest.raises(MemoryError):
        Peaks(2, 2**62)


@pytest.mark.parametrize(("reader", "times"), [(-1, 1), (8, 1), (0, 0), (0, -1)])
def test_bad_reads(reader: int, times: int) -> None:
    buffers = native.PeakBuffers([0], 512)
    with pytest.raises(ValueError, match=r"reader|times"):
        buffers.read_seconds(reader, times)


@pytest.mark.parametrize(
    ("cores", "kind", "rounds"), [([], 0, 1), ([-1], 0, 1), ([0], -1, 1), ([0], 3, 1), ([0], 0, 0)]
)
def test_bad_multiplications(cores: list[int], kind: int, rounds: int) -> None:
    with pytest.raises(ValueError, match=r"cores|kind|rounds"):
        native.multiply_seconds(cores, kind, rounds)


def test_bad_peaks() -> None:
    with pytest.raises(ValueError, match="num_threads"):
        Peaks(0, 1000)
    with Peaks(1, 1000) as machine, pytest.raises(ValueError):
        machine.multiply_add("float64")


def test_a_core_that_is_not_there() -> None:
    """One may be taken away between asking and measuring; the thread then runs anywhere."""
    assert is_positive(native.multiply_seconds([0, 10**9], 0, 10))


def test_after_closing(brief: None) -> None:
    machine = Peaks(1, 1000)
    peak = machine.read()
    machine.close()
    machine.close()
    with pytest.raises(RuntimeError, match="closed"):
        peak.seconds()
    with pytest.raises(RuntimeError, match="closed"):
        machine.read()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "native", None)
    with pytest.raises(RuntimeError, match=r"install a C\+\+ compiler"):
        Peaks(1, 1000)


def test_several_at_once(brief: None) -> None:
    def measured(kind: str) -> tuple[float, float]:
        with Peaks(2, 200_000) as machine:
            return machine.read().measure(), machine.multiply_add(kind).measure()

    with ThreadPoolExecutor() as pool:
        for read, multiplied in pool.map(measured, KINDS):
            assert is_positive(read) and is_positive(multiplied)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_in_a_child_after_a_fork() -> None:
    process = processes.run([sys.executable, "-c", FORK])
    assert process.returncode == 0, process.stderr
    child, parent = process.stdout.splitlines()
    assert [is_positive(float(value)) for value in (*child.split(), *parent.split())] == [True] * 4
