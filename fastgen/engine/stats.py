"""What an engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen.engine.scheduler import StepPlan


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    failed_steps: int = 0  # besides those that ended rows for their own faults alone
    prefill_tokens: int = 0  # prompt tokens computed
    reused_tokens: int = 0  # prompt tokens found in the KV cache instead
    decode_tokens: int = 0  # drawn tokens fed back
    largest_step: int = 0  # tokens
    speculated_steps: int = 0  # with drafts
    drafted_tokens: int = 0  # fed before they were drawn
    accepted_tokens: int = 0  # of them, those that were then drawn; they count as decoded, too

    def count(self, plan: StepPlan) -> None:
        """A step that has run."""
        tokens = len(plan.batch.token_ids)
        self.steps += 1
        self.decode_tokens += plan.num_decoding
        self.prefill_tokens += tokens - plan.num_decoding - plan.num_drafted
        self.largest_step = max(self.largest_step, tokens)
        self.speculated_steps += plan.num_drafted > 0
        self.drafted_tokens += plan.num_drafted

    def count_accepted(self, count: int) -> None:
        """So many of a row's drafted tokens were drawn, and are the row's."""
        self.accepted_tokens += count
        self.decode_tokens += count
