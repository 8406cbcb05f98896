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

    def count(self, plan: StepPlan) -> None:
        """A step that has run."""
        tokens = len(plan.batch.token_ids)
        self.steps += 1
        self.decode_tokens += plan.num_decoding
        self.prefill_tokens += tokens - plan.num_decoding
        self.largest_step = max(self.largest_step, tokens)
