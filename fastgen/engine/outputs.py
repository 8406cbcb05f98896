"""What a step gave its rows. Some of that comes from logits on the host: the log-probabilities of a
prompt, and the draws of rows whose options only the host can run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgen.decoders.interface import PendingStep
from fastgen.engine.requests import Row
from fastgen.engine.scheduler import ScheduledRow, StepPlan
from fastgen.errors import NothingToDrawError
from fastgen.results import TokenLogprobs
from fastgen.sampling.definition import draw, token_logprobs
from fastgen.sampling.draw import Draw
from fastgen.sampling.processors import Floats, RowState

StepOutput = Draw | BaseException | None  # of an entry's step; None: nothing was to be drawn


def step_outputs(plan: StepPlan, step: PendingStep) -> Sequence[StepOutput]:
    """What each entry got of its step; an exception where its own options raised it."""
    drawn = step.wait()
    _keep_logits(plan, step)
    if len(drawn) == len(plan.entries) == len(plan.batch.seats):
        return drawn  # every entry has drawn, and nothing else was wanted
    outputs: list[StepOutput] = []
    draws = iter(drawn)
    logits = step.logits if (plan.batch.seats < 0).any() else None
    at = 0  # in logits, where each entry's stand one after another
    for entry in plan.entries:
        output: StepOutput = None
        if entry.needs_draw and not entry.row.draws_on_host:
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


def needs_logits(plan: StepPlan) -> bool:
    """Whether the host reads logits of this step, which are gone after the decoder's next call."""
    kept = any(entry.row.raw_logits is not None for entry in plan.entries)
    return kept or bool((plan.batch.seats < 0).any())


def _keep_logits(plan: StepPlan, step: PendingStep) -> None:
    """For rows that are to have what they were drawn from."""
    if all(entry.row.raw_logits is None for entry in plan.entries):
        return
    drawing = [e.row for e in plan.entries if e.needs_draw and not e.row.draws_on_host]
    for row, logits in zip(drawing, step.drawn_logits, strict=True):
        if row.raw_logits is not None:
            row.raw_logits.append(logits.copy())


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
