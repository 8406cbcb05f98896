"""Parts of bench_around.py that need fresh processes: importing, cold start, resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from models import PRECISIONS, PROMPT

from fastgen.bench import interleave
from fastgen.bench.shapes import Shape

Record = dict[str, Any]
Options = dict[str, Any]

MEMORY_CHILD = Path(__file__).parent / "resident_memory.py"
MEMORY_ROWS = 8
ALLOWED = 1.1  # resident memory over what was planned

_IMPORTS = {
    "empty": "pass",
    "import fastgen": "import fastgen",
    "fastgen.load bound": "import fastgen; fastgen.load",
}
_FIRST_TOKEN = """
import fastgen
model = fastgen.load({folder!r}, **{options!r})
[generation] = model.generate([{prompt!r}], max_new_tokens=1, ignore_eos=True, temperature=0)
print(generation.completions[0].token_ids, flush=True)
"""

_NUMPY = "import numpy; print(0, flush=True)"
# MB: the most that was resident, and what of it no other process has.
_MEMORY = """
import json
def kilobytes(file, *names):
    lines = open(f"/proc/self/{file}").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)
peak = kilobytes("status", "VmHWM") / 1024
private = kilobytes("smaps_rollup", "Private_Clean", "Private_Dirty") / 1024
print(json.dumps({"peak_mb": round(peak), "private_mb": round(private)}))
"""


def import_time(rounds: int) -> Record:
    """Seconds that importing adds to an empty interpreter's."""
    measures = {name: partial(_process_seconds, code) for name, code in _IMPORTS.items()}
    seconds = interleave.interleave_calls(measures, rounds=rounds)
    record = {"empty interpreter": round(interleave.median(seconds["empty"]), 4)}
    for name in list(_IMPORTS)[1:]:
        added = [a - b for a, b in zip(seconds[name], seconds["empty"], strict=True)]
        record[name] = round(interleave.median(added), 4)
    return record


def cold_start(folder: Path, dtypes: list[str], load: Options, rounds: int) -> list[Record]:
    """Seconds from starting a process to its first token, and the process's memory then, with the
    weights packed in it, read from the cache, and shared. The files are in the system's cache.
    """
    cache = str(folder.parent / "cache")
    ways: dict[str, Options] = {
        "packed": {"cache": False},
        "cache": {"cache": cache},
        "shared": {"cache": cache, "share_weights": True},
    }
    measures: dict[str, Any] = {"numpy": partial(_first_line_seconds, _NUMPY)}
    codes = {}
    for dtype in dtypes:
        for way, options in ways.items():
            options = {**load, **PRECISIONS[dtype], **options}
            prompt = list(range(PROMPT))
            code = _FIRST_TOKEN.format(folder=str(folder), options=options, prompt=prompt)
            codes[dtype, way] = code
            measures[f"{dtype} {way}"] = partial(_first_line_seconds, code)
    seconds = interleave.interleave_calls(measures, rounds=rounds)
    numpy = interleave.median(seconds["numpy"])
    records: list[Record] = [{"python with numpy": round(numpy, 3)}]
    for (dtype, way), code in codes.items():
        taken = interleave.median(seconds[f"{dtype} {way}"])
        memory = json.loads(_output(code + _MEMORY).splitlines()[-1])
        records.append({"dtype": dtype, "weights": way, "seconds": round(taken, 3), **memory})
    return records


def resident_memory(folder: Path, shape: Shape, dtype: str, load: Options) -> Record:
    """Peak memory that a model adds, against its plan and the file's largest tensor."""
    options = {**load, **PRECISIONS[dtype], "max_batch_size": MEMORY_ROWS}
    command = [sys.executable, str(MEMORY_CHILD), str(folder), json.dumps(options)]
    seen = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    largest_tensor = 4 * shape.head  # the embedding, float32
    allowed = ALLOWED * (seen["planned"] + largest_tensor)
    megabytes = {name: round(size / 2**20, 1) for name, size in seen.items()}
    return {
        "dtype": dtype,
        "rows": MEMORY_ROWS,
        "megabytes": {**megabytes, "largest_tensor": round(largest_tensor / 2**20, 1)},
        "loaded_over_allowed": round((seen["loaded"] - seen["before"]) / allowed, 3),
        "filled_over_allowed": round((seen["filled"] - seen["before"]) / allowed, 3),
    }


def _process_seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def _output(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _first_line_seconds(code: str) -> float:
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if process.returncode != 0 or not line:
        raise RuntimeError(f"the process that was timed ended with {process.returncode}")
    return seconds
