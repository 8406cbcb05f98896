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
    """Seconds from starting a process to its first token; the files are in the system's cache."""
    measures = {}
    for dtype in dtypes:
        options = {**load, **PRECISIONS[dtype]}
        prompt = list(range(PROMPT))
        code = _FIRST_TOKEN.format(folder=str(folder), options=options, prompt=prompt)
        measures[dtype] = partial(_first_line_seconds, code)
    seconds = interleave.interleave_calls(measures, rounds=rounds)
    return [
        {"dtype": dtype, "seconds": round(interleave.median(values), 3)}
        for dtype, values in seconds.items()
    ]


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


def _first_line_seconds(code: str) -> float:
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if process.returncode != 0 or not line:
        raise RuntimeError(f"the process that was timed ended with {process.returncode}")
    return seconds
