"""What the CPU decoder takes of the machine: no more than planned, all given back, no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen.checkpoints.tensor_names import EMBEDDING
from fastgen.native import native
from packed_files import settled
from tiny_checkpoints import CONFIG, random_array, random_tensors, run_python, write_checkpoint

CYCLES = 300
MB = 2**20
# About 60 MB of weights and little else.
SIZES = {"n_layer": 4, "n_embd": 512, "n_inner": 2048, "vocab_size": 5000, "n_positions": 128}
LARGEST_MB = 5000 * 512 * 4 / MB
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int8 keys": {"kv_dtype": "int8"},
}

_START = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing either would fail
import fastgen

def status_mb(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

options = json.loads(sys.argv[1])
"""
_CYCLES = f"""{_START}
def cycle():
    with fastgen.load(max_batch_size=4, **options) as model:
        model("In the", max_new_tokens=2)

for number in range(30 + {CYCLES}):
    if number == 30:
        before = status_mb("VmRSS")
    cycle()
print(status_mb("VmRSS") - before)
"""
_PEAK = f"""{_START}
fastgen.load(max_batch_size=1, **options).close()  # imports, and whatever else is paid once
before = status_mb("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts anew
model = fastgen.load(sys.argv[2], max_batch_size=4, **options)
peak, held = status_mb("VmHWM") - before, status_mb("VmRSS") - before
model.generate([[1] * 60, [2] * 60], max_new_tokens=60, ignore_eos=True)
used = status_mb("VmHWM") - before
plan = model.plan.memory
model.close()
left = status_mb("VmRSS") - before
print(json.dumps([peak, held, used, left, plan.weights, plan.kv_cache, plan.scratch]))
"""
_TEXT = """
import sys, fastgen
with fastgen.load(max_batch_size=2, decoder="cpu") as model:
    [generation] = model.generate("And it came to pass", temperature=0, max_new_tokens=9)
    [score] = model.score(["In the beginning"])
    pieces = "".join(map(str, model.stream("And it came to pass", temperature=0, max_new_tokens=9)))
assert pieces == generation.text
print(generation.text, [name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""

pytestmark = [
    pytest.mark.skipif(native is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own, as large as the embedding."""
    tensors = random_tensors({**CONFIG, **SIZES})
    tensors["lm_head.weight"] = random_array(*tensors[EMBEDDING].shape) + 1
    return write_checkpoint(tmp_path_factory.mktemp("60 MB"), tensors, **SIZES)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = random_tensors({**CONFIG, **SIZES})
    return write_checkpoint(tmp_path_factory.mktemp("50 MB"), tensors, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_loading_and_closing_300_times_keeps_nothing(name: str) -> None:
    grown = float(run_python(_CYCLES, json.dumps(OPTIONS[name])))
    print(f"{grown:.2f} MB in {CYCLES} cycles")
    assert grown < 2


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_is_what_was_planned(name: str, folder: Path) -> None:
    """And a tensor that is read; malloc may still have the memory of the one before."""
    output = json.loads(run_python(_PEAK, json.dumps(OPTIONS[name]), folder))
    peak, held, used, left = output[:4]
    weights, kv_cache, scratch = (size / MB for size in output[4:])
    assert weights > 15
    assert peak < 1.1 * (weights + 2 * LARGEST_MB)
    assert 0.9 * weights < held <= peak
    assert used < 1.1 * (weights + kv_cache + scratch + 2 * LARGEST_MB)
    assert left < LARGEST_MB + 4


@pytest.mark.parametrize("share", [False, True], ids=["copied", "shared"])
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_from_the_cache_take_what_was_planned_and_no_tensor(
    name: str, share: bool, tied_folder: Path, tmp_path: Path
) -> None:
    """Where there are two heads, both are read, to be compared."""
    folder, options = tied_folder, {**OPTIONS[name], "cache": str(tmp_path)}
    fastgen.load(settled(folder), max_batch_size=1, **options).close()
    assert len(list(tmp_path.iterdir())) == 1
    options["share_weights"] = share
    peak, held, used, left, *plan = json.loads(run_python(_PEAK, json.dumps(options), folder))
    weights, kv_cache, scratch = (size / MB for size in plan)
    assert 0.9 * weights < held <= peak < 1.1 * weights + 4
    assert used < 1.1 * (weights + kv_cache + scratch) + 4
    assert left < 4


def test_text_in_and_out_without_pytorch() -> None:
    assert run_python(_TEXT).splitlines()[-1].endswith("[]")
