"""Where the weights of a CPU decoder come from: packed from a checkpoint now, or as they were
packed before, from the cache or a folder of packed weights.

Which of these it is changes the time, and no bit: packing depends on the tensors, the shape, the
kind of weights and NumPy's logarithm (for int8), not on the instruction set or the number of
threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import __version__
from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checkpoints.identity import Identity
from fastgen.checkpoints.packed import (
    FORMAT,
    PackedHeader,
    PackedWeights,
    Section,
    read_header,
    write_packed,
)
from fastgen.decoders.cpu.packing import pack_weights
from fastgen.decoders.pack_cache import PackCache, UntrustedError, logger
from fastgen.errors import CheckpointError
from fastgen.native import native

Shape = dict[str, Any]  # as cpu/plan.py makes it
# What of a shape the weights do not depend on.
_OF_A_STEP = ("kv_dtype", "max_tokens", "max_logits")


class CpuWeights:
    """Makes the C++ decoder of one model, with its weights.

    Args:
        shape: as decoder_shape of plan.py makes it.
        cache: the folder of the cache; None: there is none.
        share: whether processes are to share one copy, which is mapped.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shape: Shape,
        *,
        num_blocks: int,
        num_threads: int,
        cache: str | None = None,
        share: bool = False,
    ) -> None:
        self._checkpoint, self._shape, self._share = checkpoint, shape, share
        self._num_blocks, self._num_threads = num_blocks, num_threads
        self._cache = None if cache is None else PackCache(Path(cache))
        self._trouble: Exception | None = None  # the first with the cache
        self._has_stored = False

    def decoder(self) -> Any:
        """The C++ decoder. Trouble with the cache is logged, in one line, and costs only time.

        Raises:
            CheckpointError: the checkpoint or the packed folder cannot be read, or does not fit.
        """
        packed = self._checkpoint.packed
        if packed is not None:
            return self._of_folder(packed)
        identity = None if self._cache is None else self._checkpoint.identity()
        if self._cache is None or identity is None:
            return self._pack()
        decoder = self._of_cache(self._cache, identity)
        self._log()
        return decoder

    def write(self, file: int) -> None:
        """Pack, and write a file that PackedWeights opens to a descriptor.

        Raises:
            CheckpointError: as `decoder` does. OSError: it cannot be written.
        """
        decoder = self._pack()
        write_packed(file, self._header(decoder, key=""), decoder.weights())
        decoder.close()

    def _new(self, mapped: tuple[int, int] | None = None) -> Any:
        return native.CpuDecoder(self._shape, self._num_blocks, self._num_threads, mapped)

    def _pack(self) -> Any:
        decoder = self._new()
        pack_weights(self._checkpoint, decoder, self._shape["weights"])
        return decoder

    def _of_folder(self, packed: PackedWeights) -> Any:
        with packed.opened() as file:
            try:
                return self._read(file, str(packed.path), key="")
            except OSError as error:
                raise CheckpointError(f"{packed.path}: cannot be read: {error.strerror}") from error

    def _of_cache(self, cache: PackCache, identity: Identity) -> Any:
        key = cache_key(identity, self._shape)
        found = self._from_entry(cache, key)
        if found is not None:
            return found
        decoder = self._pack()
        # What was packed is what the key names if that has not changed since, and would show it.
        if not identity.is_settled or self._checkpoint.identity() != identity:
            self._trouble = self._trouble or OSError(f"{self._checkpoint.name} has just changed")
            return decoder
        try:
            cache.store(key, decoder.weights().nbytes, lambda file: self._store(file, decoder, key))
            self._has_stored = True
        except OSError as error:
            self._trouble = self._trouble or error
            return decoder
        return (self._from_entry(cache, key) if self._share else None) or decoder

    def _from_entry(self, cache: PackCache, key: str) -> Any:
        """None if there is none that can be used."""
        try:
            with cache.opened(key) as file:
                decoder = self._read(file, cache.where(key), key)
                cache.touch(file)
                return decoder
        except FileNotFoundError:
            return None
        except (OSError, CheckpointError) as error:
            self._trouble = self._trouble or error
            return None

    def _read(self, file: int, where: str, key: str) -> Any:
        """A decoder of a file's weights: a copy, or, to be shared, the file itself.

        Raises:
            CheckpointError: the file is not this model's, packed for this decoder, and whole.
            OSError: it cannot be read.
        """
        header, start = read_header(file, where)
        self._check(header, where, key)
        checksums = [section.checksum for section in header.sections]
        if self._share:
            decoder = self._new((file, start))
            found = decoder.weight_checksums()
        else:
            decoder = self._new()
            found = decoder.read_weights(file, start)
        if found != checksums:
            decoder.close()
            raise CheckpointError(f"{where}: the weights are damaged")
        return decoder

    def _check(self, header: PackedHeader, where: str, key: str) -> None:
        wanted = self._shape["dtype"], self._shape["weights"], key
        if (header.dtype, header.weights, header.key) != wanted:
            raise CheckpointError(f"{where}: holds other weights than its name says")
        sections = [(section.offset, section.num_bytes) for section in header.sections]
        if sections != native.weight_sections(self._shape):
            raise CheckpointError(f"{where}: does not fit the shape that config.json gives")

    def _store(self, file: int, decoder: Any, key: str) -> None:
        write_packed(file, self._header(decoder, key), decoder.weights())

    def _header(self, decoder: Any, key: str) -> PackedHeader:
        pieces, sums = native.weight_sections(self._shape), decoder.weight_checksums()
        return PackedHeader(
            layout=native.packed_layout(),
            dtype=self._shape["dtype"],
            weights=self._shape["weights"],
            name=self._checkpoint.name,
            key=key,
            tensors=dict(self._checkpoint.tensors()),
            sections=tuple(
                Section(offset, num_bytes, checksum)
                for (offset, num_bytes), checksum in zip(pieces, sums, strict=True)
            ),
        )

    def _log(self) -> None:
        error = self._trouble
        if error is not None:
            told = "written to the cache again" if self._has_stored else "not cached"
            matters = self._share or isinstance(error, (CheckpointError, UntrustedError))
            log = logger.warning if matters else logger.info
            log("packed weights are %s: %s", told, error)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One file of the cache.

    Attributes:
        name: what was packed; None if the file cannot be read.
        dtype, weights: as of a DecoderPlan.
        num_bytes: of the file.
        used: when it was used last, in seconds since 1970.
    """

    name: str | None
    dtype: str | None
    weights: str | None
    num_bytes: int
    used: float


def cached_models(cache: PackCache) -> Iterator[CachedModel]:
    """What is in a cache, used last first.

    Raises:
        OSError: the folder cannot be read, or may be another user's.
    """
    for entry in cache.entries():
        try:
            with cache.opened(entry.key) as file:
                read, _ = read_header(file, cache.where(entry.key))
            told: tuple[str | None, ...] = read.name, read.dtype, read.weights
        except (OSError, CheckpointError):
            told = None, None, None
        name, dtype, weights = told
        yield CachedModel(name, dtype, weights, entry.num_bytes, entry.used)


def cache_key(identity: Identity, shape: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of all that packed weights follow from."""
    parts = {
        "format": FORMAT.hex(),
        "layout": native.packed_layout(),
        "versions": [__version__, np.__version__, os.uname().machine],
        "source": identity.digest,
        "shape": {name: value for name, value in shape.items() if name not in _OF_A_STEP},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
