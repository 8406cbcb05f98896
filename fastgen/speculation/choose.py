"""Which drafters a model gets: what a caller asked for, and what its decoder promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.checks import wrong_type, wrong_value
from fastgen.decoders.memory import MB
from fastgen.decoders.plan import DecoderPlan, LoadOptions
from fastgen.decoders.select import build_decoder, plan_decoder
from fastgen.errors import OptionError
from fastgen.speculation.draft_model import DraftModelDrafter
from fastgen.speculation.drafter import Drafter, FunctionDrafter
from fastgen.speculation.suffix import SuffixDrafter

CHOICES = ("auto", "suffix", "off")
DraftFunction = Callable[[Sequence[int], int], Sequence[int]]


def check_choice(speculate: Any, *, has_draft_model: bool) -> None:
    """Raise OptionTypeError or OptionError for what `load` cannot take as `speculate`."""
    if callable(speculate):
        if has_draft_model:
            raise wrong_draft("a function drafts already; leave one of them out")
        return
    if not isinstance(speculate, str):
        names, found = ", ".join(map(repr, CHOICES)), type(speculate).__name__
        raise wrong_type("speculate", f"must be one of {names}, or a function, not {found}")
    if speculate not in CHOICES:
        raise wrong_value("speculate", f"must be one of {', '.join(CHOICES)}, not {speculate!r}")
    if speculate == "off" and has_draft_model:
        raise wrong_draft("speculate='off' leaves nothing for it to do")


def wrong_draft(problem: str) -> OptionError:
    return OptionError(f"draft_model: {problem}", "draft_model", problem)


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
            OptionError: an option that cannot be met, with what can.
        """
        plan = plan_decoder(checkpoint, self.options)
        if not self.has_suffix(plan):
            return plan
        limits = plan.limits
        beside = SuffixDrafter.planned_bytes(limits.num_seats, limits.max_seq_len)
        return plan_decoder(checkpoint, self.options, beside)

    def drafters(self, target: DecoderPlan) -> Sequence[Drafter]:
        """In the order in which they are asked; a draft model is loaded now.

        Raises:
            OptionError: the draft model does not fit.
        """
        if not isinstance(self.speculate, str):
            return [FunctionDrafter(self.speculate)]
        drafters: list[Drafter] = []
        if self.has_suffix(target):
            drafters.append(SuffixDrafter())
        plan = self.draft_plan(target)
        if self.draft is not None and plan is not None:
            drafters.append(DraftModelDrafter(build_decoder(self.draft, plan)))
        return drafters

    def draft_plan(self, target: DecoderPlan) -> DecoderPlan | None:
        """The draft model's decoder, in the memory that the model leaves; None without one.

        Raises:
            OptionError: it does not fit.
        """
        draft = self.draft
        if draft is None:
            return None
        left = self.options.max_memory
        if left is not None:
            left = max(1, left - -(-target.memory.total // MB))
        longest = min(target.limits.max_seq_len, draft.config.max_positions)
        options = replace(self.options, max_seq_len=longest, max_memory=left, batch_invariant=None)
        try:
            return plan_decoder(draft, options)
        except ValueError as error:
            whole = self.options.max_memory
            less = "" if left is None else f"the model leaves {left} MB of max_memory={whole} MB; "
            raise wrong_draft(f"{less}{error}") from error

    def has_suffix(self, target: DecoderPlan) -> bool:
        """Whether the text guesses: where it is not asked for by name, it does where no token can
        depend on it."""
        exact = target.limits.batch_invariant
        return self.speculate == "suffix" or (self.speculate == "auto" and exact)
