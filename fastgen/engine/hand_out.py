"""What a step gave its rows is handed out: token by token, each as if it had come alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgen.engine.drafting import Drafting
from fastgen.engine.outputs import StepOutput
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

    def give(self, entries: Sequence[ScheduledRow], outputs: Sequence[StepOutput]) -> None:
        """Give the rows what they got of a step: every row's first token, then every row's second,
        as steps of plain decoding would. What goes wrong ends its row alone."""
        drafted: list[tuple[ScheduledRow, list[StepOutput]]] = []
        for entry, output in zip(entries, outputs, strict=True):
            row = entry.row
            if row.has_ended:
                continue  # while the step was under way
            row.num_steps += 1
            if not entry.drafts:
                self._give_one(entry, output)
                continue
            drafted.append((entry, list(output) if isinstance(output, list) else [output]))
            self._give_next(entry, 0, drafted[-1][1])
        num_given = [1] * len(drafted)
        for place in range(1, max((len(draws) for _, draws in drafted), default=0)):
            self._between_tokens()
            for at, (entry, draws) in enumerate(drafted):
                if place < len(draws) and not entry.row.has_ended:
                    self._give_next(entry, place, draws)
                    num_given[at] += 1
        for (entry, _), count in zip(drafted, num_given, strict=True):
            self._settle(entry, count)

    def _give_next(self, entry: ScheduledRow, place: int, draws: Sequence[StepOutput]) -> None:
        self._give_one(ScheduledRow(entry.row, entry.start + place, 1, True), draws[place])

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
