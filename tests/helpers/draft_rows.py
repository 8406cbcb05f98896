"""Rows as drafters see them, without an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgen.sampling.params import SamplingParams


@dataclass(eq=False)
class PlainRow:
    """A fastgen.speculation.drafter.DraftRow."""

    token_ids: list[int]
    prompt_len: int = 0
    cache_salt: str | None = None
    max_len: int = 10_000
    params: SamplingParams = field(default_factory=SamplingParams)
