"""Products of int8 on every path under sanitizers, against a scalar reference."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cpu_decoders import INSTRUCTION_SETS
from sanitizers import ADDRESS, COMMON, ROOT, compiler, counts, failure, run

DRIVER = ROOT / "tests" / "native" / "int8_driver.cpp"
SECONDS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are set up for Linux"),
]


def program(sources: Path, made: Path) -> Path:
    parts = [*sources.glob("decoder/decoder_kernels*.cpp"), sources / "decoder/packed_linear.cpp"]
    pool, include = sources / "common/thread_pool.cpp", f"-I{sources}"
    run(compiler("g++"), *COMMON, *ADDRESS, include, *parts, pool, DRIVER, "-o", made)
    return made


def test_int8_products(tmp_path: Path) -> None:
    driver = program(ROOT / "csrc", tmp_path / "int8")
    print(counts(driver, SECONDS, r"(\d+) cases", (300,)), "cases")


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(INSTRUCTION_SETS), reason="what is broken is not run here"
)
@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        pytest.param(
            "decoder_dots.inc",
            "_mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8)",
            "_mm512_srli_epi16(_mm512_slli_epi16(both, 8), 8)",
            "found == wanted",
            id="weights without a sign",
        ),
        pytest.param(
            "decoder_codes.inc",
            "constexpr int kCodeOffset = 128;",
            "constexpr int kCodeOffset = 127;",
            "found == wanted",
            id="another zero point",
        ),
        pytest.param(
            "decoder_codes.inc",
            "(count + 3) / 4 * sizeof(std::uint64_t)",
            "sizeof wide",
            "AddressSanitizer",
            id="writes past a row",
        ),
    ],
)
def test_the_int8_drivers_checks_can_fail(
    name: str, old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    source = (sources / "decoder" / name).read_text()
    assert source.count(old) == 1
    (sources / "decoder" / name).write_text(source.replace(old, new))
    assert complaint in failure(program(sources, tmp_path / "int8"), 10)
