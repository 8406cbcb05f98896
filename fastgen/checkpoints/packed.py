"""Files of packed weights: the memory of a decoder's weights, after a header that says what it is.

    bytes 0 to 7     "fastgen" and the version of this format
    8 to 15          the header's length, little-endian
    16 to 23         XXH64 of the length, the header and its padding, little-endian
    from 24          the header: JSON, then zeros up to a multiple of 64 KB
    then             the weights, section after section, each with a checksum in the header

A folder of packed weights has such a file, config.json and the tokenizer's files. Entries of the
cache are such files, too (decoders/pack_cache.py). Checksums tell damage; whom the file is from,
its reader has to know.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.checkpoints.config import DTYPES
from fastgen.checkpoints.files import TensorInfo, checked_file, strict_json
from fastgen.checkpoints.identity import Identity
from fastgen.errors import CheckpointError, shown_name
from fastgen.native import native

PACKED_FILE = "model.fastgen"
FORMAT = b"fastgen\x01"
_PREAMBLE = struct.Struct("<8sQQ")
_ALIGNMENT = 1 << 16  # of the weights in the file: a multiple of every system's pages
_MAX_HEADER = 16 * 2**20
_CHUNK = 32 * 2**20  # bytes that are written at a time
# What reading JSON of another form can raise; ArithmeticError for numbers that are too large.
_MALFORMED = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_ACTIVATIONS, _WEIGHTS = ("float32", "bfloat16"), (*DTYPES, "int8")


class Section(NamedTuple):
    """A piece of the weights: where it lies in their memory, and its checksum."""

    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What a file of packed weights holds.

    Attributes:
        layout: how the weights lie in memory, as `native.packed_layout()` names it.
        dtype, weights: as of a DecoderPlan.
        name: what was packed, for people.
        key: of a cache's entry; "" in a folder.
        tensors: what was packed, by canonical name.
        sections: in order, without gaps.
    """

    layout: str
    dtype: str
    weights: str
    name: str
    key: str
    tensors: Mapping[str, TensorInfo]
    sections: tuple[Section, ...]

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(section.num_bytes for section in self.sections)

    def encoded(self) -> bytes:
        """What stands in the file before the weights."""
        record = {
            "layout": self.layout,
            "dtype": self.dtype,
            "weights": self.weights,
            "name": self.name,
            "key": self.key,
            "tensors": {name: [info.dtype, *info.shape] for name, info in self.tensors.items()},
            "sections": self.sections,
        }
        text = json.dumps(record, separators=(",", ":")).encode()
        padding = bytes(_start(len(text)) - _PREAMBLE.size - len(text))
        checksum = _checksum(len(text), text + padding)
        return _PREAMBLE.pack(FORMAT, len(text), checksum) + text + padding


class PackedWeights:
    """The packed weights of a folder, in place of its tensors (a TensorSource)."""

    def __init__(self, folder: Path) -> None:
        self.path = checked_file(folder, PACKED_FILE)
        if native is None or not hasattr(os, "pread"):
            raise CheckpointError(
                f"{self.path}: is read by fastgen's C++ extension, on POSIX systems only"
            )
        with self.opened() as file:
            self.header, _ = read_header(file, str(self.path))
        self.infos = dict(self.header.tensors)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file, closed afterwards."""
        try:
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            yield file
        finally:
            os.close(file)

    def load(self, key: str) -> NDArray[Any]:
        raise CheckpointError(f"{self.path}: {key} is packed, and only the CPU decoder reads it")

    def identity(self) -> Identity | None:
        return None  # there is nothing to pack


def read_header(file: int, where: str) -> tuple[PackedHeader, int]:
    """The header of an open file, and the offset of the weights, which the file holds whole.

    Raises:
        CheckpointError: it is no such file, of another version or layout, cut off or damaged.
        OSError: it cannot be read.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{where}: is not a regular file")
    preamble = _read(file, 0, _PREAMBLE.size)
    if len(preamble) < _PREAMBLE.size or preamble[:7] != FORMAT[:7]:
        raise CheckpointError(f"{where}: is not a file of packed weights")
    magic, length, checksum = _PREAMBLE.unpack(preamble)
    if magic != FORMAT:
        raise CheckpointError(
            f"{where}: has version {magic[-1]} of the format of packed weights, this fastgen reads "
            f"version {FORMAT[-1]}; pack the model again"
        )
    start = _start(length)
    if length > _MAX_HEADER or start > status.st_size:
        raise CheckpointError(f"{where}: is cut off or damaged")
    text = _read(file, _PREAMBLE.size, start - _PREAMBLE.size)
    if len(text) != start - _PREAMBLE.size or _checksum(length, text) != checksum:
        raise CheckpointError(f"{where}: the header is damaged")
    header = _parsed(text[:length], where)
    if header.layout != native.packed_layout():
        raise CheckpointError(
            f"{where}: was packed as {header.layout}, and this fastgen reads "
            f"{native.packed_layout()}; pack the model again"
        )
    if status.st_size != start + header.num_bytes:
        raise CheckpointError(f"{where}: is cut off or damaged")
    return header, start


def write_packed(file: int, header: PackedHeader, weights: NDArray[np.uint8]) -> None:
    """Write header and weights (header.num_bytes) to an open, empty file.

    Raises:
        OSError: they do not fit, or cannot be written.
    """
    for whole in (memoryview(header.encoded()), weights.data):
        while whole:
            whole = whole[os.write(file, whole[:_CHUNK]) :]


def _start(length: int) -> int:
    """Where the weights begin after a header of so many bytes."""
    return -(-(_PREAMBLE.size + length) // _ALIGNMENT) * _ALIGNMENT


def _checksum(length: int, text: bytes) -> int:
    told = struct.pack("<Q", length) + text
    return int(native.xxh64(np.frombuffer(told, np.uint8)))


def _read(file: int, offset: int, count: int) -> bytes:
    """Fewer bytes at the end of the file only."""
    parts = []
    while count and (part := os.pread(file, count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return b"".join(parts)


def _parsed(text: bytes, where: str) -> PackedHeader:
    try:
        record = strict_json(text)
        names = {name: record[name] for name in ("layout", "dtype", "weights", "name", "key")}
        if not all(isinstance(value, str) for value in names.values()):
            raise TypeError("a name is no string")
        if names["dtype"] not in _ACTIVATIONS or names["weights"] not in _WEIGHTS:
            raise ValueError("an unknown kind of weights")
        tensors = {
            str(name): TensorInfo(PACKED_FILE, tuple(map(int, shape)), str(dtype))
            for name, (dtype, *shape) in record["tensors"].items()
        }
        sections = tuple(Section(*map(int, section)) for section in record["sections"])
    except _MALFORMED as error:
        raise CheckpointError(f"{where}: the header is damaged") from error
    names["name"] = shown_name(names["name"])
    return PackedHeader(tensors=tensors, sections=sections, **names)
