"""Which drafters a model gets: what a caller asked for, and what its decoder promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.decoders.memory import MB
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.speculation.draft_model import DraftModelDrafter
from fastgen.speculation.drafter import Drafter, FunctionDrafter
from fastgen.speculation.suffix import SuffixDrafter

CHOICES = ("auto", "suffix", "off")
DraftFunction = Callable[[Sequence[int], int], Sequence[int]]


def check_choice(speculate: Any, *, has_draft_model: bool) -> None:
    """Raise TypeError or ValueError for what `load` cannot take as `speculate`."""
    if callable(speculate):
        if has_draft_model:
            raise ValueError("draft_model: a function drafts already; leave one of them out")
        return
    if not isinstance(speculate, str):
        raise TypeError(f"speculate must be a name or a function, not {type(speculate).__name__}")
    if speculate not in CHOICES:
        raise ValueError(f"speculate must be one of {', '.join(CHOICES)}, not {speculate!r}")
    if speculate == "off" and has_draft_model:
        raise ValueError("draft_model: speculate='off' leaves nothing for it to do")


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a caller of `load` asked for.

    Attributes:
        speculate: one of CHOICES, or a function that drafts.
        draft: the draft model, if one was given; its vocabulary is the model's.
        options: what the model is loaded with; the draft model gets the same.
    """

    speculate: str | DraftFunction
    draft: Checkpoint | None
    options: LoadOptions

    def plan(self, checkpoint: Checkpoint) -> DecoderPlan:
        """The model's decoder, and in its scratch memory what drafters keep; a draft model has a
        plan of its own.

        Raises:
            ValueError: an option that cannot be met, with what can.
        """
        plan = plan_decoder(checkpoint, self.options)
        if not self._has_suffix(plan):
            return plan
        limits = plan.limits
        beside = SuffixDrafter.planned_bytes(limits.num_seats, limits.max_seq_len)
        return plan_decoder(checkpoint, self.options, beside)

    def drafters(self, target: DecoderPlan) -> Sequence[Drafter]:
        """In the order in which they are asked; a draft model is loaded now.

        Raises:
            ValueError: the draft model does not fit.
        """
        if not isinstance(self.speculate, str):
            return [FunctionDrafter(self.speculate)]
        drafters: list[Drafter] = []
        if self._has_suffix(target):
            drafters.append(SuffixDrafter())
        if self.draft is not None:
            drafters.append(self._model(self.draft, target))
        return drafters

    def _has_suffix(self, target: DecoderPlan) -> bool:
        """Where it is not asked for by name, it is used where no token can depend on it."""
        exact = target.limits.batch_invariant
        return self.speculate == "suffix" or (self.speculate == "auto" and exact)

    def _model(self, draft: Checkpoint, target: DecoderPlan) -> Drafter:
        left = self.options.max_memory
        if left is not None:
            left = max(1, left - -(-target.memory.total // MB))
        longest = min(target.limits.max_seq_len, draft.config.max_positions)
        options = replace(self.options, max_seq_len=longest, max_memory=left, batch_invariant=None)
        try:
            return DraftModelDrafter(build_decoder(draft, plan_decoder(draft, options)))
        except ValueError as error:
            raise ValueError(f"draft_model: {error}") from error
