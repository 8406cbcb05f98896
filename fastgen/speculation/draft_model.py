"""DraftModelDrafter: another GPT-2 guesses, a smaller one with the same vocabulary.

It draws with the row's own options and uniforms, as the row itself will: where the two models agree
about the probabilities, they draw the same tokens, sampled ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fastgen.decoders.interface import Decoder, Ints, StepBatch
from fastgen.decoders.memory import blocks_for
from fastgen.sampling.options import unknown_to
from fastgen.sampling.params import SamplingParams
from fastgen.speculation.drafter import Draft, DraftRow


@dataclass(slots=True, eq=False)
class _Seat:
    """A row's place in the decoder: its sampler's seat, and blocks of its own.

    Attributes:
        fed: the tokens whose keys and values are in the blocks.
        drawn: the tokens that the sampler counts as the row's.
        draft: what is being drafted; `wanted` tokens at most.
    """

    index: int
    params: SamplingParams
    fed: list[int] = field(default_factory=list)
    drawn: list[int] | None = None
    draft: list[int] = field(default_factory=list)
    wanted: int = 0


class DraftModelDrafter:
    """Drafts with a decoder of its own, which it closes. All rows of a step are run as one batch.

    A row whose tokens do not fit in one step of the decoder is caught up with chunk by chunk, and
    gets its first draft after that. Rows beyond the decoder's seats and blocks get none.
    """

    is_free: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = True

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, limits = decoder, decoder.limits
        self._blocks_each = blocks_for(limits.max_seq_len)
        num_seats = min(limits.num_seats, limits.num_blocks // self._blocks_each)
        self._free = list(reversed(range(num_seats)))
        self._seats: dict[DraftRow, _Seat] = {}

    @property
    def survives_fork(self) -> bool:
        return self._decoder.survives_fork

    def warmup(self) -> None:
        self._decoder.warmup()

    def propose(self, rows: Sequence[DraftRow], most: Sequence[int]) -> list[Draft]:
        seats = [self._seat(row) for row in rows]
        drafting = []
        budget = self._decoder.limits.max_tokens
        counts = []  # of tokens that each row's first step feeds
        for row, seat, wanted in zip(rows, seats, most, strict=True):
            if seat is None:
                continue
            seat.draft, seat.wanted = [], wanted
            if not budget:
                continue
            count = min(self._missing(row, seat), budget)
            if count:
                budget -= count
                drafting.append((row, seat))
                counts.append(count)
        if drafting:
            self._catch_up(drafting, counts)
            self._decode([seat for _, seat in drafting])
        return [Draft(()) if seat is None else Draft(seat.draft) for seat in seats]

    def accepted(self, row: DraftRow, ids: Sequence[int]) -> None:
        """Nothing to do: what was wrong shows when the row is drafted for again."""

    def ended(self, row: DraftRow) -> None:
        seat = self._seats.pop(row, None)
        if seat is not None:
            self._free.append(seat.index)
            if seat.drawn is not None:
                self._decoder.release(seat.index)

    def close(self) -> None:
        self._decoder.close()

    def _seat(self, row: DraftRow) -> _Seat | None:
        seat = self._seats.get(row)
        if seat is None and self._free and not unknown_to(self._decoder.known_options, row.params):
            params = replace(row.params, logprobs=None)  # nobody reads them
            seat = self._seats[row] = _Seat(self._free.pop(), params)
        return seat

    def _missing(self, row: DraftRow, seat: _Seat) -> int:
        """How many of the row's tokens have to be fed before the next can be drawn; what had been
        fed and is not the row's is forgotten. 0: the row is too long for the model."""
        del seat.fed[_agreeing(seat.fed, row.token_ids) :]
        if len(row.token_ids) >= self._decoder.limits.max_seq_len:
            return 0
        del seat.fed[len(row.token_ids) - 1 :]  # the last is fed in any case
        return len(row.token_ids) - len(seat.fed)

    def _catch_up(self, drafting: Sequence[tuple[DraftRow, _Seat]], counts: Sequence[int]) -> None:
        """Feed each row's missing tokens, and draw the first of its draft if these are all."""
        token_ids: list[int] = []
        logits_at: list[int] = []
        drawing: list[_Seat] = []
        starts = [len(seat.fed) for _, seat in drafting]
        for (row, seat), count in zip(drafting, counts, strict=True):
            new = row.token_ids[len(seat.fed) : len(seat.fed) + count]
            token_ids += new
            seat.fed += new
            if len(seat.fed) == len(row.token_ids) and len(drawing) < self._most_drawing:
                self._bind(row, seat)
                logits_at.append(len(token_ids) - 1)
                drawing.append(seat)
        batch = StepBatch.ragged(
            token_ids=token_ids,
            counts=counts,
            cache_lens=starts,
            block_tables=self._block_tables([seat for _, seat in drafting]),
            logits_at=logits_at,
            seats=[seat.index for seat in drawing],
        )
        self._draw(batch, drawing)

    def _decode(self, seats: Sequence[_Seat]) -> None:
        """Draw one token after another of each draft that has begun."""
        longest = self._decoder.limits.max_seq_len - 1
        while going := [
            seat for seat in seats if 0 < len(seat.draft) < seat.wanted and len(seat.fed) < longest
        ]:
            batch = StepBatch.decode(
                [seat.draft[-1] for seat in going],
                [len(seat.fed) for seat in going],
                self._block_tables(going),
                np.array([seat.index for seat in going], np.int32),
            )
            for seat in going:
                seat.fed.append(seat.draft[-1])
            self._draw(batch, going)

    def _draw(self, batch: StepBatch, drawing: Sequence[_Seat]) -> None:
        draws = self._decoder.step(batch).wait()
        for seat, draw in zip(drawing, draws, strict=True):
            if draw.ok and seat.drawn is not None:
                seat.draft.append(draw.token_id)
                seat.drawn.append(draw.token_id)
            else:
                seat.wanted = 0

    def _bind(self, row: DraftRow, seat: _Seat) -> None:
        """Let the sampler count the row's tokens, and no others."""
        drawn, token_ids = seat.drawn, row.token_ids
        if drawn is None or _agreeing(drawn, token_ids) < len(drawn):
            seat.drawn = drawn = token_ids[: row.prompt_len]
            self._decoder.bind(seat.index, seat.params, drawn)
        for token_id in token_ids[len(drawn) :]:
            self._decoder.observe(seat.index, token_id)
            drawn.append(token_id)

    def _block_tables(self, seats: Sequence[_Seat]) -> Ints:
        """(seats, blocks of each): those of one seat follow each other."""
        tables = np.arange(self._blocks_each, dtype=np.int32) + np.zeros((len(seats), 1), np.int32)
        tables += np.array([[seat.index * self._blocks_each] for seat in seats], np.int32)
        return tables

    @property
    def _most_drawing(self) -> int:
        return self._decoder.limits.max_logits


def _agreeing(known: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many tokens, from the first on, are the same in both."""
    count = min(len(known), len(token_ids))
    if known[:count] == token_ids[:count]:
        return count
    return next(at for at in range(count) if known[at] != token_ids[at])
