"""Steps with one token a row as CUDA graphs: from embedding to drawn ids, one launch.

There is a graph for each bucket of rows and kind of draws, made when it is first needed. Its last
kernel moves the bucket's inputs on (the drawn token is the next one, positions and lengths grow by
one), so a step that only continues the last one needs nothing from the host.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fastgen.decoders.cuda.inputs import InputCopier, buckets, decode_parts, step_inputs
from fastgen.decoders.cuda.model import CudaModel
from fastgen.decoders.cuda.sampler import CudaSampler, Kind
from fastgen.decoders.interface import Capacity, Ints, StepBatch
from fastgen.decoders.memory import blocks_for

_capturing = threading.Lock()  # one thread at a time: others' would be broken off
_VARYING = ("token_ids", "positions", "cache_lens", "block_tables", "seats")


class Line:
    """The inputs of a bucket: on the device, and as the host knows them to be there."""

    def __init__(self, num_rows: int, width: int, spare_block: int, device: torch.device) -> None:
        self._idle = decode_parts(num_rows, width, spare_block)
        size = sum(part.size + 4 for part in self._idle.values())
        self._copier = InputCopier(size, device)
        self._known = dict(self._idle)
        self.on_device = self._copier.copy(self._known)

    def rest(self) -> None:
        """Padding rows only."""
        self._known = dict(self._idle)
        self._copier.copy(self._known)

    def bring(self, batch: StepBatch, seats: Ints, *, is_next: bool) -> None:
        """Set the device's inputs to this step's; is_next: no other step ran in between."""
        wanted = self._padded(batch, seats)
        if not is_next or any(
            not np.array_equal(part, self._known[name]) for name, part in wanted.items()
        ):
            self._known |= wanted
            self._copier.copy(self._known)

    def follow(self) -> None:
        """A step was launched: it advances the inputs of the rows that draw."""
        drew = self._known["seats"] >= 0
        for name in ("positions", "cache_lens"):
            self._known[name] = self._known[name] + drew.astype(np.int32)
        drawn = -1 - self._known["seats"]
        self._known["token_ids"] = np.where(drew, drawn, self._known["token_ids"])

    def _padded(self, batch: StepBatch, seats: Ints) -> dict[str, Ints]:
        wanted = {name: self._idle[name].copy() for name in _VARYING}
        for name in ("token_ids", "positions", "cache_lens"):
            wanted[name][: len(seats)] = getattr(batch, name)
        wanted["block_tables"][: len(seats), : batch.block_tables.shape[1]] = batch.block_tables
        wanted["seats"][: len(seats)] = seats
        return wanted


class DecodeGraphs:
    """Makes, keeps and launches them. Without a GPU, the same kernels are started one by one."""

    def __init__(self, model: CudaModel, sampler: CudaSampler, limits: Capacity) -> None:
        self._model, self._sampler = model, sampler
        self._width = blocks_for(limits.max_seq_len)
        self._buckets = buckets(limits.num_seats)
        self._lines: dict[int, Line] = {}
        self._replays: dict[tuple[int, Kind], Callable[[], None]] = {}
        self._last: Line | None = None

    def launch(self, batch: StepBatch, seats: Ints) -> None:
        """Start a step of at most as many rows as there are seats.

        Args:
            batch: one token a row; those that its seat drew last are written as -1 - seat.
            seats: (R,) that draw on the device.
        """
        bucket = self._buckets[bisect_left(self._buckets, len(seats))]
        kind = self._sampler.kind(seats)
        line = self._line(bucket)
        replay = self._replays.get((bucket, kind)) or self._make(bucket, kind)
        line.bring(batch, seats, is_next=line is self._last)
        replay()
        line.follow()
        self._last = line

    def interrupt(self) -> None:
        """Another step ran: the lines no longer hold what seats drew last."""
        self._last = None

    def make_all(self, kinds: list[Kind]) -> None:
        for bucket in self._buckets:
            for kind in kinds:
                if (bucket, kind) not in self._replays:
                    self._make(bucket, kind)

    def clear(self) -> None:
        """Their memory is no longer that of the model."""
        self._lines, self._replays, self._last = {}, {}, None

    def _line(self, bucket: int) -> Line:
        if bucket not in self._lines:
            spare, device = self._model.spare_block, self._model.device
            self._lines[bucket] = Line(bucket, self._width, spare, device)
        return self._lines[bucket]

    def _make(self, bucket: int, kind: Kind) -> Callable[[], None]:
        line, sampler = self._line(bucket), self._sampler
        inputs = step_inputs(line.on_device, 0, 1)
        fed = {name: line.on_device[name] for name in ("token_ids", "positions", "cache_lens")}
        feedback = replace(sampler.feedback, **fed)

        def run() -> None:
            table = sampler.table
            self._model.forward(inputs, sampler.scores, table.last_drawn, feedback.num_steps)
            sampler.launch(line.on_device["seats"], bucket, kind, feedback)

        replay = run
        if self._model.device.type == "cuda":
            self._last = None
            line.rest()
            run()  # compiles and loads its kernels, which cannot be done while it is captured
            sampler.num_steps += 1
            torch.cuda.current_stream(self._model.device).synchronize()
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream(self._model.device)
            captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            # What PyTorch makes at the first capture of a process, later ones use: also those of
            # others, outside of inference mode.
            with torch.inference_mode(False), _capturing, captured:
                run()
            replay = graph.replay
        self._replays[bucket, kind] = replay
        return replay
