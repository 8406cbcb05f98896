"""Drives a decoder by hand: rows of tokens in, logits out, with blocks handed out in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastgen.decoders.interface import Decoder, StepBatch
from fastgen.decoders.memory import blocks_for


class Rows:
    """Rows with blocks of their own, taken from the pool in shuffled order."""

    def __init__(self, decoder: Decoder, count: int, seed: int = 0) -> None:
        self.decoder = decoder
        width = blocks_for(decoder.limits.max_seq_len)
        blocks = np.random.default_rng(seed).permutation(decoder.limits.num_blocks)[: count * width]
        self.tables = blocks.astype(np.int32).reshape(count, width)
        self.cache_lens = np.zeros(count, np.int32)

    def batch(
        self, tokens: Sequence[Sequence[int]], seats: Sequence[int] | None = None
    ) -> StepBatch:
        """Feed each row its next tokens (none: the row sits out).

        Without seats, the logits of every token are wanted and none is drawn; with seats, each row
        that is fed draws behind its last token.
        """
        rows = [row for row, new in enumerate(tokens) if len(new)]
        counts = np.array([len(tokens[row]) for row in rows])
        cached, total = self.cache_lens[rows], int(counts.sum())
        self.cache_lens[rows] += counts.astype(np.int32)
        return StepBatch.ragged(
            token_ids=np.concatenate([tokens[row] for row in rows]),
            counts=counts,
            cache_lens=cached,
            block_tables=self.tables[rows],
            logits_at=np.arange(total) if seats is None else np.cumsum(counts) - 1,
            seats=np.full(total, -1) if seats is None else [seats[row] for row in rows],
        )


def to_numpy(logits: Any) -> np.ndarray:
    """A copy of a decoder's logits, on the host."""
    return np.from_dlpack(logits.cpu() if hasattr(logits, "cpu") else logits).copy()


def all_logits(
    decoder: Decoder, rows: Sequence[Sequence[int]], chunks: Sequence[int], seed: int = 0
) -> list[np.ndarray]:
    """Logits (T, V) of every token of each row, fed in chunks of the given sizes, over and over."""
    stepper = Rows(decoder, len(rows), seed)
    found: list[list[np.ndarray]] = [[] for _ in rows]
    fed = [0] * len(rows)
    turn = 0
    while any(done < len(row) for done, row in zip(fed, rows, strict=True)):
        size = chunks[turn % len(chunks)]
        new = [row[done : done + size] for done, row in zip(fed, rows, strict=True)]
        logits = to_numpy(decoder.forward(stepper.batch(new)))
        for row, tokens in enumerate(new):
            found[row].append(logits[: len(tokens)])
            logits = logits[len(tokens) :]
            fed[row] += len(tokens)
        turn += 1
    return [np.concatenate(parts) for parts in found]
