"""Which content weight files have, told without reading all of it."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # read from each file, at equal distances
_MAX_HEADER = 16 * 2**20  # bytes of a safetensors header that count
# Within such a time after a change, another one may leave the same times. File systems without
# fractions of a second count in seconds, some in two; the others in ticks of the kernel's clock.
_COARSE_NS, _FINE_NS = 2 * 10**9, 50 * 10**6


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one content of some files from another.

    Attributes:
        digest: SHA-256, hexadecimal. Of each file: inode, size, time of change and of the inode's
            change (which no program can set), the header, and samples of the rest.
        is_settled: whether a change from now on changes the digest. It is not, right after one.
    """

    digest: str
    is_settled: bool


def identity_of(paths: Iterable[Path]) -> Identity | None:
    """Of safetensors files, in this order; None if one of them cannot be read."""
    digest = hashlib.sha256()
    is_settled = True
    try:
        for path in paths:
            # Not to wait, should the file have become a pipe meanwhile.
            file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):
                    return None
                is_settled &= _is_settled(status.st_ctime_ns)
                for part in _parts(file, status):
                    digest.update(struct.pack("<Q", len(part)) + part)
            finally:
                os.close(file)
    except OSError:
        return None
    return Identity(digest.hexdigest(), is_settled)


def _is_settled(changed_ns: int) -> bool:
    window = _FINE_NS if changed_ns % 10**9 else _COARSE_NS
    return changed_ns + window < time.time_ns()


def _parts(file: int, status: os.stat_result) -> Iterable[bytes]:
    size = status.st_size
    yield f"{status.st_ino} {size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    yield os.pread(file, min(length, _MAX_HEADER), 8)
    for sample in range(_SAMPLES):
        yield os.pread(file, _SAMPLE_BYTES, max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
