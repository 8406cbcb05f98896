"""The checksums under sanitizers, by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sanitizers import ADDRESS, COMMON, INCLUDE, POOL, ROOT, THREAD, compiler, counts, failure, run

CHECKSUM_DRIVER = ROOT / "tests" / "native" / "checksum_driver.cpp"
CHECKSUM = ROOT / "csrc" / "common" / "checksum.cpp"
CHECKSUM_SECONDS = 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are set up for Linux"),
]


@pytest.mark.parametrize(
    "flags", [pytest.param(ADDRESS, id="address"), pytest.param(THREAD, id="thread")]
)
def test_checksums(flags: tuple[str, ...], tmp_path: Path) -> None:
    program = tmp_path / "checksum"
    run(compiler("g++"), *COMMON, *flags, INCLUDE, CHECKSUM, POOL, CHECKSUM_DRIVER, "-o", program)
    print(counts(program, CHECKSUM_SECONDS, r"(\d+) cases", (50,)), "cases")


@pytest.mark.parametrize(
    ("flags", "old", "new", "complaint"),
    [
        pytest.param(
            ADDRESS,
            "end - at >= 8; at += 8",
            "end > at; at += 8",
            "AddressSanitizer",
            id="past the end",
        ),
        pytest.param(
            ADDRESS,
            "std::min(kPiece, spans[i].bytes - at)",
            "kPiece",
            "AddressSanitizer",
            id="whole pieces",
        ),
        pytest.param(ADDRESS, "kPrime5, 11", "kPrime5, 12", "reference", id="another sum"),
        pytest.param(
            ADDRESS,
            "  std::memcpy(&word, at, sizeof word);",
            "  word = *reinterpret_cast<const Word*>(at);",
            "misaligned",
            id="odd addresses",
        ),
        pytest.param(
            THREAD,
            "for (int i = begin; i < end; ++i) pieces",
            "static volatile int last = 0;\nfor (int i = begin; i < end; last = ++i) pieces",
            "ThreadSanitizer: data race",
            id="race",
        ),
    ],
)
def test_the_checksum_drivers_checks_can_fail(
    flags: tuple[str, ...], old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    source = CHECKSUM.read_text()
    assert source.count(old) == 1
    broken, program = tmp_path / CHECKSUM.name, tmp_path / "checksum"
    broken.write_text(source.replace(old, new))
    run(compiler("g++"), *COMMON, *flags, INCLUDE, broken, POOL, CHECKSUM_DRIVER, "-o", program)
    assert complaint in failure(program, 5)
