"""Drives a decoder by hand, without an engine: rows with blocks of their own, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import fastgen
from fastgen.decoders.interface import Decoder, StepBatch
from fastgen.decoders.memory import blocks_for
from fastgen.sampling.draw import Draw

Piece = tuple[int, int, Sequence[int], bool]  # row, tokens cached, new tokens, whether it draws


class Rows:
    """`count` rows of at most `max_len` tokens; row r sits in seat r."""

    def __init__(self, decoder: Decoder, count: int, max_len: int) -> None:
        self.decoder, self.count = decoder, count
        width = blocks_for(max_len)
        if count * width > decoder.limits.num_blocks:
            raise ValueError(f"{count} rows of {max_len} tokens exceed the decoder's KV cache")
        self._tables = np.arange(count * width, dtype=np.int32).reshape(count, width)

    def bind(self, prompts: Sequence[Sequence[int]], **options: Any) -> None:
        """Give every row its seat, with the same options but a seed of its own."""
        for seat, prompt in enumerate(prompts):
            params = fastgen.SamplingParams(seed=seat, ignore_eos=True, **options)
            self.decoder.bind(seat, params, prompt)

    def release(self) -> None:
        for seat in range(self.count):
            self.decoder.release(seat)

    def prefill_batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[StepBatch]:
        """The prompts in as few steps as the decoder takes; each row draws after its last token."""
        room = self.decoder.limits.max_tokens
        pieces: list[Piece] = []
        for row, prompt in enumerate(prompts):
            done = 0
            while done < len(prompt):
                new = prompt[done : done + room]
                pieces.append((row, done, new, done + len(new) == len(prompt)))
                done += len(new)
                room -= len(new)
                if room == 0:
                    yield self._batch(pieces)
                    pieces, room = [], self.decoder.limits.max_tokens
        if pieces:
            yield self._batch(pieces)

    def decode_batches(self, cached: int, steps: int) -> list[StepBatch]:
        """`steps` steps, each of which feeds every row the token that it drew last."""
        drawn = [[-1 - seat] for seat in range(self.count)]
        return [
            self._batch([(row, cached + step, new, True) for row, new in enumerate(drawn)])
            for step in range(steps)
        ]

    def run(self, batches: Iterable[StepBatch]) -> list[Draw]:
        """All the steps; the draws of the last."""
        draws: list[Draw] = []
        for batch in batches:
            draws = self.decoder.step(batch).wait()
        return draws

    def seconds(self, batches: Sequence[StepBatch]) -> float:
        """All the steps, timed."""
        start = time.perf_counter()
        self.run(batches)
        return time.perf_counter() - start

    def _batch(self, pieces: Sequence[Piece]) -> StepBatch:
        rows, cached, new, draws = zip(*pieces, strict=True)
        counts, drawing = [len(tokens) for tokens in new], np.flatnonzero(draws)
        return StepBatch.ragged(
            token_ids=np.concatenate(new),
            counts=counts,
            cache_lens=cached,
            block_tables=self._tables[list(rows)],
            logits_at=(np.cumsum(counts) - 1)[drawing],
            seats=np.array(rows)[drawing],
        )
