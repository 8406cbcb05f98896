"""Draw: what a sampler returns."""

from __future__ import annotations

from typing import NamedTuple

from fastgen.results import TokenLogprobs


class Draw(NamedTuple):
    """One drawn token. Where the logits were NaN or infinite, `ok` is false and `token_id` 0."""

    seat: int
    token_id: int
    ok: bool = True
    logprobs: TokenLogprobs | None = None
