"""Tiny random GPT-2 checkpoints, ways to spoil them, and the check that one is refused."""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import fastgen
import processes
from engine_harness import cpu_seconds, num_calls

Array = NDArray[Any]

CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 10,
    "eos_token_id": 10,
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
MESSAGE_CHARS = 2000  # that a refusal may be long, whatever the files hold
_OPTIONS: dict[str, Any] = {"device": "cpu", "max_batch_size": 2}
_DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "uint8": "U8",
}
_PRINT_REFUSALS = """
import json, sys, fastgen
for folder in sys.argv[1:]:
    try:
        fastgen.load(folder, device="cpu", max_batch_size=2)
        print(json.dumps("loaded"), flush=True)
    except fastgen.CheckpointError as error:
        print(json.dumps(str(error)), flush=True)
"""


def random_tensors(config: Mapping[str, Any] = CONFIG) -> dict[str, Array]:
    """Every tensor of a GPT-2 with a tied head, by the names of GPT-2's own checkpoints."""
    c, inner = config["n_embd"], config.get("n_inner", 4 * config["n_embd"])
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], c),
        "wpe.weight": (config["n_positions"], c),
    }
    for h in (f"h.{layer}" for layer in range(config["n_layer"])):
        shapes |= {f"{h}.ln_1.weight": (c,), f"{h}.ln_1.bias": (c,)}
        shapes |= {f"{h}.attn.c_attn.weight": (c, 3 * c), f"{h}.attn.c_attn.bias": (3 * c,)}
        shapes |= {f"{h}.attn.c_proj.weight": (c, c), f"{h}.attn.c_proj.bias": (c,)}
        shapes |= {f"{h}.ln_2.weight": (c,), f"{h}.ln_2.bias": (c,)}
        shapes |= {f"{h}.mlp.c_fc.weight": (c, inner), f"{h}.mlp.c_fc.bias": (inner,)}
        shapes |= {f"{h}.mlp.c_proj.weight": (inner, c), f"{h}.mlp.c_proj.bias": (c,)}
    shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    return {name: random_array(*shape) for name, shape in shapes.items()}


def random_array(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32) / 10


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_vocabulary(folder: Path) -> None:
    """GPT-2's own tokenizer files."""
    write_json(folder / "vocab.json", TOKENIZER["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


def write_config(folder: Path, **changes: Any) -> None:
    """The usual config.json, with `changes`."""
    write_json(folder / "config.json", {**CONFIG, **changes})


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Array] | None = None, **changes: Any
) -> Path:
    """A folder that loads, unless its `tensors` or `changes` to its config make it not to."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **changes)
    chosen = random_tensors() if tensors is None else tensors
    save_file(dict(chosen), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, *shards: Mapping[str, Array]) -> dict[str, str]:
    """config.json and the shards 0.safetensors, 1.safetensors, ...; returns their weight_map."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    for number, tensors in enumerate(shards):
        save_file(dict(tensors), folder / f"{number}.safetensors")
    return {name: f"{number}.safetensors" for number, ts in enumerate(shards) for name in ts}


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def lay_out(tensors: Mapping[str, Array]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, apart, so that the header can be made to lie."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    return header, data


def pack(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of a header (bytes, or what JSON can hold) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_raw(folder: Path, weights: bytes) -> Path:
    """A folder with the usual config and `weights` as its model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def load(folder: Path | str) -> fastgen.Generator:
    return fastgen.load(folder, **_OPTIONS)


def assert_loads(folder: Path | str) -> None:
    """It loads and takes a step."""
    with load(folder) as model:
        [generation] = model.generate([1, 2, 3], max_new_tokens=2, temperature=0, ignore_eos=True)
    assert len(generation.completions[0].token_ids) == 2


def assert_refused(folder: Path | str, *causes: str) -> None:
    """Loading fails at once with a CheckpointError that names the folder and the causes.

    At once: with not much more work than it takes to load a good one. Calls of functions count,
    which no machine changes, and so does the processor's time, since one call may take long.
    """
    good = cost_of_a_good_load()

    def refuse() -> None:
        with pytest.raises(fastgen.CheckpointError) as caught:
            load(folder).close()
        assert_names(str(caught.value), str(folder), *causes)

    assert num_calls(refuse) < 20 * good.calls
    assert cpu_seconds(refuse) < 200 * good.seconds


def assert_names(message: str, *parts: str) -> None:
    """Every part stands in a message of sane length."""
    assert len(message) < MESSAGE_CHARS
    for part in parts:
        assert part in message


def refusals(*folders: Path) -> list[str]:
    """What loading each says, in one other process: for files that could hang or abort it.

    Shorter than `folders` if it was aborted, or if anything but a CheckpointError was raised.
    """
    done = processes.run([sys.executable, "-c", _PRINT_REFUSALS, *folders])
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Standard output of a Python program that must end well."""
    command = [sys.executable, "-c", code, *arguments]
    done = processes.run(command, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def cases(table: Mapping[str, Any]) -> list[Any]:
    """pytest's parameters of a table from case names to one argument, or a tuple of them."""
    rows = ((name, row if isinstance(row, tuple) else (row,)) for name, row in table.items())
    return [pytest.param(*row, id=name) for name, row in rows]


class Cost(NamedTuple):
    calls: int
    seconds: float


@cache
def cost_of_a_good_load() -> Cost:
    """Once all is imported that a load imports, so that no refusal is charged for it."""
    with tempfile.TemporaryDirectory() as folder:
        assert_loads(write_checkpoint(Path(folder)))

        def load_well() -> None:
            load(folder).close()

        return Cost(num_calls(load_well), min(cpu_seconds(load_well) for _ in range(3)))
