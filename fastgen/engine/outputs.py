"""What a step gave its rows. Some of that comes from logits on the host: the log-probabilities of a
prompt, and the draws of rows whose options only the host can run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from fastgen.decoders.interface import PendingStep
from fastgen.engine.requests import Row
from fastgen.engine.scheduler import ScheduledRow, StepPlan
from fastgen.errors import NothingToDrawError
from fastgen.results import TokenLogprobs
from fastgen.sampling.definition import draw, token_logprobs
from fastgen.sampling.draw import Draw
from fastgen.sampling.processors import Floats, RowState

# Of an entry's step; None: nothing was to be drawn. A list: the draws of a row with drafts, up to
# and including the first that differs from its draft.
StepOutput = Draw | list[Draw] | BaseException | None


def step_outputs(plan: StepPlan, step: PendingStep) -> Sequence[StepOutput]:
    """What each entry got of its step; an exception where its own options raised it."""
    drawn = step.wait()
    if len(drawn) == len(plan.entries) == len(plan.batch.seats):  # and nothing else was wanted
        _keep_logits(plan, step, itertools.repeat(1))
        return drawn
    drawing = [entry for entry in plan.entries if _draws_in_decoder(entry)]
    draws_of = drawn if len(drawing) == len(drawn) else _by_seat(drawn)
    _keep_logits(plan, step, [len(d) if isinstance(d, list) else 1 for d in draws_of])
    outputs: list[StepOutput] = []
    draws = iter(draws_of)
    logits = step.logits if (plan.batch.seats < 0).any() else None
    at = 0  # in logits, where each entry's stand one after another
    for entry in plan.entries:
        output: StepOutput = None
        if _draws_in_decoder(entry):
            output = next(draws)
        if logits is not None and (count := entry.num_host_logits):
            try:
                output = use_logits(entry, logits[at : at + count]) or output
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # sys.exit in a row's function is that row's error, too
                output = error
            at += count
        outputs.append(output)
    return outputs


def _draws_in_decoder(entry: ScheduledRow) -> bool:
    return entry.needs_draw and not entry.row.draws_on_host


def _by_seat(drawn: Sequence[Draw]) -> Sequence[Draw | list[Draw]]:
    """Draws that follow each other at one seat are one row's."""
    by_seat = [list(draws) for _, draws in itertools.groupby(drawn, lambda draw: draw.seat)]
    return [draws[0] if len(draws) == 1 else draws for draws in by_seat]


def needs_logits(plan: StepPlan) -> bool:
    """Whether the host reads logits of this step, which are gone after the decoder's next call."""
    kept = any(entry.row.raw_logits is not None for entry in plan.entries)
    return kept or bool((plan.batch.seats < 0).any())


def _keep_logits(plan: StepPlan, step: PendingStep, num_kept: Iterable[int]) -> None:
    """For rows that are to have what they were drawn from: of each row that draws in the decoder,
    so many of its draws."""
    if all(entry.row.raw_logits is None for entry in plan.entries):
        return
    logits, at = step.drawn_logits, 0
    drawing = [entry for entry in plan.entries if _draws_in_decoder(entry)]
    for entry, count in zip(drawing, num_kept, strict=False):
        if entry.row.raw_logits is not None:
            entry.row.raw_logits += (one.copy() for one in logits[at : at + count])
        at += 1 + len(entry.drafts)


def use_logits(entry: ScheduledRow, logits: Floats) -> Draw | None:
    """Score what the entry scores, and draw if its row draws on the host.

    Args:
        logits: float32 (entry.num_host_logits, V), not changed.

    Raises:
        NothingToDrawError: a score would be NaN.
        Whatever the row's logits_processor raises.
    """
    if entry.num_scored:
        _score(entry, logits[: entry.num_scored])
    return _drawn(entry.row, logits[-1]) if len(logits) > entry.num_scored else None


def _score(entry: ScheduledRow, logits: Floats) -> None:
    if not np.isfinite(logits.max(axis=1)).all():
        raise NothingToDrawError
    request = entry.row.request
    assert request.prompt_logprobs is not None
    first = entry.start + 1  # each token's logits are for the next one
    targets = request.prompt_token_ids[first : first + entry.num_scored]
    request.prompt_logprobs += token_logprobs(logits, targets, request.params.prompt_logprobs or 0)


def _drawn(row: Row, logits: Floats) -> Draw:
    if row.raw_logits is not None:
        row.raw_logits.append(logits.copy())
    state = RowState(np.array(row.token_ids, np.int64), row.prompt_len, sorted(row.stop_ids))
    token_id, ok = draw(logits, row.params, state)
    logprobs: TokenLogprobs | None = None
    if ok and row.params.logprobs is not None:
        [logprobs] = token_logprobs(logits[None], [token_id], row.params.logprobs)
    return Draw(row.schedule.seat, token_id, ok, logprobs)
