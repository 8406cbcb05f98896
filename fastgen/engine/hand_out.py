"""What a step gave its rows is handed out: token by token, each as if it had come alone."""

from __future__ import annotations

from collections.abc import Callable

from fastgen.engine.drafting import Drafting
from fastgen.engine.outputs import StepOutput
from fastgen.engine.requests import Row
from fastgen.engine.scheduler import ScheduledRow, Scheduler
from fastgen.engine.stats import EngineStats
from fastgen.errors import NothingToDrawError
from fastgen.sampling.draw import Draw


class HandOut:
    """Used by an engine's step alone.

    Args:
        between_tokens: ends what was cancelled or is late; called where plain decoding would have
            begun another step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        drafting: Drafting,
        stats: EngineStats,
        eos_ids: frozenset[int],
        between_tokens: Callable[[], object],
    ) -> None:
        self._scheduler, self._drafting, self._stats = scheduler, drafting, stats
        self._eos_ids, self._between_tokens = eos_ids, between_tokens

    def give(self, entry: ScheduledRow, output: StepOutput) -> None:
        """Give a row what it got of a step; what goes wrong ends it alone."""
        row = entry.row
        if row.has_ended:
            return  # it ended while the step was under way
        row.num_steps += 1
        if not entry.drafts:
            self._give_one(entry, output)
            return
        draws = output if isinstance(output, list) else [output]
        num_given = 0
        for draw in draws:
            if num_given and self._ends_before_next(row):
                break
            self._give_one(ScheduledRow(row, entry.start + num_given, 1, True), draw)
            num_given += 1
        self._settle(entry, num_given)

    def _ends_before_next(self, row: Row) -> bool:
        """Whether plain decoding would have ended the row before it drew another token."""
        self._between_tokens()
        return row.has_ended

    def _settle(self, entry: ScheduledRow, num_given: int) -> None:
        """What came of a row's drafts: their places in the cache are its own as far as they were
        right, and it had not ended."""
        row, num_accepted = entry.row, num_given - 1
        row.num_drafted += len(entry.drafts)
        row.num_accepted += num_accepted
        self._stats.count_accepted(num_accepted)
        if row.raw_logits is not None:
            del row.raw_logits[len(row.token_ids) - row.prompt_len :]
        if not row.has_ended:
            row.schedule.lease.retract(entry.count - num_given)
            self._drafting.took(row, entry.drafts, num_accepted)

    def _give_one(self, entry: ScheduledRow, output: StepOutput) -> None:
        row = entry.row
        try:
            self._scheduler.advance(entry)
            if isinstance(output, Draw):
                row.accept(output, self._eos_ids)
                row.request.row_drew(row)
            elif isinstance(output, BaseException):
                row.fail(output)
            elif entry.end >= row.prefill_len:
                row.finish("length")  # nothing was to be drawn
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            row.fail(error)
        if isinstance(row.error, NothingToDrawError):  # keys and values may be NaN like the logits
            row.schedule.lease.forget()
