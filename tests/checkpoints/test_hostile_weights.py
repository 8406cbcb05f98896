"""Safetensors files that lie, are cut off, or hold the wrong tensors: each refused by its cause."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastgen.checkpoints.checkpoint import open_checkpoint
from fastgen.errors import CheckpointError
from tiny_checkpoints import (
    Array,
    assert_loads,
    assert_names,
    assert_refused,
    cases,
    lay_out,
    load,
    pack,
    random_array,
    random_tensors,
    write_checkpoint,
    write_raw,
)

HEADER, DATA = lay_out(random_tensors())
GOOD = pack(HEADER, DATA)
DATA_START = len(GOOD) - len(DATA)
WTE_BYTES = 11 * 8 * 4


def length(value: int, rest: bytes = GOOD[8:]) -> bytes:
    """A file that says its header is `value` bytes long."""
    return struct.pack("<Q", value) + rest


# File -> what the message says of it.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header too small"),
    "1 byte": (b"\x08", "header too small"),
    "7 bytes": (GOOD[:7], "header too small"),
    "header length 0": (length(0), "invalid JSON in header: EOF"),
    "header length 1": (length(1), "invalid JSON in header: EOF"),
    "header one byte shorter": (length(DATA_START - 9), "invalid JSON in header: EOF"),
    "header one byte longer": (length(DATA_START - 7), "in header"),
    "header longer than the file": (length(len(GOOD) - 7), "invalid header length"),
    "header over 100 MB": (length(100_000_001), "header too large"),
    "header length 2^63": (length(2**63), "header too large"),
    "header length 2^64-1": (length(2**64 - 1), "header too large"),
    "header length 2^64-8": (length(2**64 - 8), "header too large"),
    "big-endian length": (struct.pack(">Q", DATA_START - 8) + GOOD[8:], "header too large"),
    "not UTF-8": (pack(b'{"\xff\xfe": 1}', DATA), "invalid UTF-8 in header"),
    "UTF-16": (pack(json.dumps(HEADER).encode("utf-16"), DATA), "invalid UTF-8 in header"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "invalid JSON in header: expected value"),
    "not JSON": (pack(b"hello, world"), "invalid JSON in header"),
    "null": (pack(None), "invalid type: null"),
    "array": (pack([HEADER], DATA), "invalid type: sequence"),
    "string": (pack("wte.weight"), "invalid type: string"),
    "deep arrays": (pack(b'{"a":' + b"[" * 10**6), "recursion limit exceeded"),
    "deep objects": (pack(b'{"a":' * 10**5), "recursion limit exceeded"),
    "text after the JSON": (pack(json.dumps(HEADER).encode() + b"x", DATA), "trailing characters"),
    "no tensors": (pack({}), "0 layers"),
    "only metadata": (pack({"__metadata__": {"format": "pt"}}), "0 layers"),
    "metadata no object": (pack({**HEADER, "__metadata__": 5}, DATA), "expected a map"),
    "metadata no string": (pack({**HEADER, "__metadata__": {"a": 5}}, DATA), "expected a string"),
    "trailing byte": (GOOD + b"\0", "file not fully covered"),
    "trailing file": (GOOD + GOOD, "file not fully covered"),
    "pickle": (b"\x80\x04\x95" + bytes(64), "invalid header length"),
    "zip": (b"PK\x03\x04" + bytes(64), "invalid header length"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "header too large"),
}


@pytest.mark.parametrize(("raw", "cause"), cases(FILES))
def test_malformed_file(tmp_path: Path, raw: bytes, cause: str) -> None:
    assert_refused(write_raw(tmp_path, raw), cause)


def fields(name: str = "wte.weight", /, **changes: Any) -> dict[str, Any]:
    """The header with other fields for one tensor; a field of None is left out."""
    entry = {**HEADER[name], **changes}
    return {**HEADER, name: {key: value for key, value in entry.items() if value is not None}}


WPE = HEADER["wpe.weight"]["data_offsets"]  # next in the file after wte.weight

# Header over the usual data -> what the message says of it.
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no dtype": (fields(dtype=None), "missing field `dtype`"),
    "no shape": (fields(shape=None), "missing field `shape`"),
    "no offsets": (fields(data_offsets=None), "missing field `data_offsets`"),
    "entry is a number": ({**HEADER, "wte.weight": 5}, "expected struct TensorInfo"),
    "entry is null": ({**HEADER, "wte.weight": None}, "expected struct TensorInfo"),
    "unknown dtype": (fields(dtype="F33"), "unknown variant `F33`"),
    "lower-case dtype": (fields(dtype="f32"), "unknown variant `f32`"),
    "dtype number": (fields(dtype=32), "invalid type: integer `32`"),
    "wider dtype": (fields(dtype="F64"), "invalid shape, data type, or offset"),
    "narrower dtype": (fields(dtype="F16"), "invalid shape, data type, or offset"),
    "shape number": (fields(shape=88), "expected a sequence"),
    "shape string": (fields(shape="11,8"), "expected a sequence"),
    "negative size": (fields(shape=[-11, 8]), "integer `-11`"),
    "two negative sizes": (fields(shape=[-11, -8]), "integer `-11`"),
    "fractional size": (fields(shape=[11.5, 8]), "floating point `11.5`"),
    "string size": (fields(shape=["11", 8]), 'string "11"'),
    "size 2^64": (fields(shape=[2**64, 8]), "expected usize"),
    "product 2^64": (fields(shape=[2**32, 2**32]), "overflow"),
    "bytes 2^64": (fields(shape=[2**61, 2]), "overflow"),
    "product wraps to the right one": (fields(shape=[2**62, 4, 22]), "overflow"),
    "overflow times zero": (fields(shape=[2**40, 2**40, 0]), "overflow"),
    "shape too small": (fields(shape=[10, 8]), "invalid shape, data type, or offset"),
    "shape too large": (fields(shape=[12, 8]), "invalid shape, data type, or offset"),
    "zero size over data": (fields(shape=[0, 8]), "invalid shape, data type, or offset"),
    "no dimensions": (fields(shape=[]), "invalid shape, data type, or offset"),
    "one offset": (fields(data_offsets=[0]), "invalid length 1"),
    "three offsets": (fields(data_offsets=[0, 1, 2]), "invalid length 3"),
    "offsets object": (fields(data_offsets={"a": 0}), "expected a tuple"),
    "string offsets": (fields(data_offsets=["0", "352"]), 'string "0"'),
    "fractional offsets": (fields(data_offsets=[0.5, WTE_BYTES]), "floating point `0.5`"),
    "negative begin": (fields(data_offsets=[-1, WTE_BYTES]), "integer `-1`"),
    "negative end": (fields(data_offsets=[0, -WTE_BYTES]), f"integer `-{WTE_BYTES}`"),
    "reversed": (fields(data_offsets=[WTE_BYTES, 0]), "invalid offset for tensor"),
    "one byte less": (fields(data_offsets=[0, WTE_BYTES - 1]), "invalid"),
    "one byte more": (fields(data_offsets=[0, WTE_BYTES + 1]), "invalid"),
    "shifted": (fields(data_offsets=[4, WTE_BYTES + 4]), "invalid offset for tensor"),
    "end 2^64-1": (fields(data_offsets=[0, 2**64 - 1]), "invalid"),
    "end 2^64": (fields(data_offsets=[0, 2**64]), "expected usize"),
    "begin and end past 2^63": (fields(data_offsets=[2**63, 2**63 + WTE_BYTES]), "invalid offset"),
    "same data twice": (fields(data_offsets=[WPE[0], WPE[0] + WTE_BYTES]), "invalid offset"),
    "overlap": (fields("wpe.weight", data_offsets=[WPE[0] - 4, WPE[1] - 4]), "invalid offset"),
    "gap": (fields("wpe.weight", data_offsets=[WPE[0] + 4, WPE[1] + 4]), "invalid offset"),
    "tensor missing in front": ({k: HEADER[k] for k in [*HEADER][1:]}, "invalid offset"),
    "tensor missing at the end": ({k: HEADER[k] for k in [*HEADER][:-1]}, "not fully covered"),
    "tensor past the end": (
        {**HEADER, "z": {"dtype": "F32", "shape": [2], "data_offsets": [len(DATA), len(DATA) + 8]}},
        "not fully covered",
    ),
}


@pytest.mark.parametrize(("header", "cause"), cases(LIES))
def test_header_lie(tmp_path: Path, header: dict[str, Any], cause: str) -> None:
    assert_refused(write_raw(tmp_path, pack(header, DATA)), "model.safetensors", cause)


def test_zero_size_tensor(tmp_path: Path) -> None:
    tensors = {**random_tensors(), "wte.weight": random_array(0, 8)}
    assert_refused(write_raw(tmp_path, pack(*lay_out(tensors))), "wte.weight has shape (0, 8)")


ENTRY = '"wte.weight": {"dtype": "F32", "shape": [11, 8], "data_offsets": [0, 352]}'
DUPLICATES = {
    "same tensor twice": (ENTRY, "wte.weight"),
    "tensor twice, other shape": (ENTRY.replace("[11, 8]", "[8, 11]"), "wte.weight"),
    "tensor twice, other dtype": (ENTRY.replace("[11, 8]", "[11, 16]").replace("F32", "F16"),
                                  "wte.weight"),
    "metadata twice": ('"__metadata__": {}, "__metadata__": {}', "duplicate field `__metadata__`"),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "cause"), cases(DUPLICATES))
def test_duplicate_keys_in_the_header(tmp_path: Path, entry: str, cause: str) -> None:
    """The format forbids them; readers disagree on which of the two counts."""
    header = f"{{{entry}, {json.dumps(HEADER)[1:]}".encode()
    assert_refused(write_raw(tmp_path, pack(header, DATA)), "model.safetensors", cause)


def test_duplicate_field_of_a_tensor(tmp_path: Path) -> None:
    header = json.dumps(HEADER).replace('"shape"', '"shape": [1], "shape"', 1).encode()
    assert_refused(write_raw(tmp_path, pack(header, DATA)), "duplicate field `shape`")


BOUNDARIES = {0, 1, 7, 8, 9, DATA_START - 1, DATA_START, DATA_START + 1, len(GOOD) - 1}
BOUNDARIES |= {DATA_START + entry["data_offsets"][0] for entry in HEADER.values()}
RANDOM_OFFSETS = {int(i) for i in np.random.default_rng(0).integers(0, len(GOOD), 50)}


@pytest.mark.parametrize("size", sorted(BOUNDARIES | RANDOM_OFFSETS))
def test_truncated(tmp_path: Path, size: int) -> None:
    cause = "incomplete metadata, file not fully covered"
    if size < DATA_START:
        cause = "header too small" if size < 8 else "invalid header length"
    assert_refused(write_raw(tmp_path, GOOD[:size]), "model.safetensors", cause)


def test_truncated_says_how_much_is_there(tmp_path: Path) -> None:
    """An interrupted download is the likeliest of all these: the size shows it."""
    assert_refused(write_raw(tmp_path, GOOD[:-1000]), f"{len(GOOD) - 1000}")


KINDS = [
    *("wte.weight", "wpe.weight", "h.1.ln_1.weight", "h.1.ln_1.bias", "h.1.attn.c_attn.weight"),
    *("h.1.attn.c_attn.bias", "h.1.attn.c_proj.weight", "h.1.attn.c_proj.bias", "h.1.ln_2.weight"),
    *("h.1.ln_2.bias", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias", "h.1.mlp.c_proj.weight"),
    *("h.1.mlp.c_proj.bias", "ln_f.weight", "ln_f.bias", "lm_head.weight"),
]
SIZES = {name: str(array.shape) for name, array in random_tensors().items()}
SIZES["lm_head.weight"] = SIZES["wte.weight"]

NOT_SQUARE = [
    *("wte.weight", "wpe.weight", "h.1.attn.c_attn.weight", "h.1.mlp.c_fc.weight"),
    *("h.1.mlp.c_proj.weight", "lm_head.weight"),
]


def with_head() -> dict[str, Array]:
    """Tensors of a model whose head is not tied to the embedding."""
    return {**random_tensors(), "lm_head.weight": random_array(11, 8) + 1}


def write_changed(folder: Path, name: str, change: Callable[[Array], Array]) -> Path:
    tensors = with_head()
    tensors[name] = change(tensors[name])
    write_checkpoint(folder, tie_word_embeddings=False)
    (folder / "model.safetensors").write_bytes(pack(*lay_out(tensors)))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_tensor_missing(tmp_path: Path, name: str) -> None:
    tensors = with_head()
    del tensors[name]
    write_checkpoint(tmp_path, tensors, tie_word_embeddings=False)
    assert_refused(tmp_path, f"tensor {name} is missing")


@pytest.mark.parametrize("name", NOT_SQUARE)
def test_tensor_transposed(tmp_path: Path, name: str) -> None:
    """As nn.Linear stores it (the square attn.c_proj.weight cannot be told apart)."""
    shape = str(with_head()[name].T.shape)
    write_changed(tmp_path, name, lambda array: np.ascontiguousarray(array.T))
    assert_refused(tmp_path, f"tensor {name} has shape {shape}", f"implies {SIZES[name]}")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "change",
    cases(
        {
            "one rank more": lambda array: array[None],
            "one rank less": lambda array: array.reshape(-1) if array.ndim > 1 else array[0],
            "one row more": lambda array: np.concatenate([array, array[:1]]),
            "one row less": lambda array: array[:-1],
            "empty": lambda array: array[:0],
        }
    ),
)
def test_tensor_of_wrong_shape(tmp_path: Path, name: str, change: Callable[[Array], Array]) -> None:
    shape = str(np.shape(change(with_head()[name])))
    write_changed(tmp_path, name, lambda array: np.asarray(change(array)))
    assert_refused(tmp_path, f"tensor {name} has shape {shape}", f"implies {SIZES[name]}")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "F8_E4M3"])
def test_tensor_of_wrong_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    types = {"F64": np.float64, "I64": np.int64, "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    write_changed(tmp_path, name, lambda array: np.ones(array.shape, types[dtype]))
    assert_refused(tmp_path, f"tensor {name} has dtype {dtype}", "float32, float16 and bfloat16")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensor_not_finite(tmp_path: Path, name: str, value: float) -> None:
    """In its last element only."""

    def spoil(array: Array) -> Array:
        array.flat[-1] = value
        return array

    assert_refused(write_changed(tmp_path, name, spoil), f"tensor {name} holds NaN or infinite")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_half_precision_not_finite(tmp_path: Path, dtype: Any, value: float) -> None:
    tensors = {name: array.astype(dtype) for name, array in random_tensors().items()}
    assert_loads(write_checkpoint(tmp_path, tensors))
    tensors["h.0.mlp.c_fc.bias"][3] = value
    assert_refused(write_checkpoint(tmp_path, tensors), "h.0.mlp.c_fc.bias holds NaN or infinite")


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight", "lm_head.weight"])
def test_tensor_stored_twice(tmp_path: Path, name: str) -> None:
    """With and without GPT-2's prefix: nothing says which one counts."""
    tensors = {**with_head(), f"transformer.{name}": with_head()[name]}
    assert_refused(write_checkpoint(tmp_path, tensors), f"tensor {name} is stored twice")


CROSS, ADAPTER = "belongs to cross-attention", "belongs to an unmerged adapter"
FOREIGN = {
    "h.0.crossattention.c_attn.weight": CROSS,
    "h.0.crossattention.q_attn.bias": CROSS,
    "transformer.h.1.ln_cross_attn.weight": CROSS,
    "h.0.attn.c_attn.lora_A.weight": ADAPTER,
    "h.0.attn.c_attn.lora_B.default.weight": ADAPTER,
    "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": ADAPTER,
    "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight": ADAPTER,
    "h.0.mlp.adapters.text.down.weight": ADAPTER,
    "prompt_encoder.default.embedding.weight": ADAPTER,
    "wte.lora_embedding_A": ADAPTER,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_tensor_that_changes_the_model(tmp_path: Path, name: str) -> None:
    tensors = {**random_tensors(), name: random_array(8, 2)}
    assert_refused(write_checkpoint(tmp_path, tensors), f"tensor {name} {FOREIGN[name]}")


def test_unused_head_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**random_tensors(), "score.weight": random_array(2, 8)})
    with pytest.warns(UserWarning, match=r"1 tensors are not used: score\.weight"):
        load(tmp_path).close()


def test_endless_tensor_name(tmp_path: Path) -> None:
    tensors = {**random_tensors(), f"h.0.lora_A.{'x' * 10**5}": random_array(1)}
    assert_refused(write_checkpoint(tmp_path, tensors), ADAPTER)


def test_control_characters_of_a_name_are_not_printed(tmp_path: Path) -> None:
    """They could rewrite the terminal that shows the message."""
    tensors = {**random_tensors(), "h.0.lora_A.\x1b[2J\r\n": random_array(1)}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_checkpoint(tmp_path, tensors))
    assert str(caught.value).isprintable()


GOOD_VARIANTS: dict[str, dict[str, Array]] = {
    "as written by hand": random_tensors(),
    "with GPT-2's prefix": {f"transformer.{k}": v for k, v in random_tensors().items()},
    "head beside the embedding": with_head(),
    "mask buffers": {**random_tensors(), "h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
                     "h.0.attn.masked_bias": np.array(-1e4, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("tensors", cases(GOOD_VARIANTS))
def test_good_file_loads(tmp_path: Path, tensors: dict[str, Array]) -> None:
    """What the cases above start from is not what they fail on."""
    assert_loads(write_raw(tmp_path, pack(*lay_out(tensors))))


def test_file_cut_after_load_does_not_matter(tmp_path: Path) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    with load(write_checkpoint(tmp_path)) as model:
        [before] = model.generate([1, 2, 3], **greedy)
        (tmp_path / "model.safetensors").write_bytes(b"")
        [after] = model.generate([1, 2, 3], **greedy)
    assert len(before.completions[0].token_ids) == 4
    assert after.completions[0].token_ids == before.completions[0].token_ids


@pytest.mark.parametrize(("raw", "cause"), cases({
    "cut": (GOOD[:-1], "not fully covered"),
    "emptied": (b"", "header too small"),
    "other tensors": (pack(*lay_out({"x": random_array(2)})), "wte.weight"),
    "other shape": (pack(*lay_out({"wte.weight": random_array(8, 11)})), "wte.weight"),
    "other dtype": (pack(*lay_out({"wte.weight": np.ones((11, 8))})), "wte.weight"),
}))  # fmt: skip
def test_file_changed_between_open_and_read(tmp_path: Path, raw: bytes, cause: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    write_raw(tmp_path, raw)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("wte.weight")
    assert_names(str(caught.value), str(tmp_path), "model.safetensors", cause)
