"""What fastgen hands back: small frozen records, one field a fact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (nats, of the raw logits) at one position.

    `logprob` is the token's own; `top` holds the most likely (token_id, logprob) pairs, best first,
    as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation of a prompt.

    `token_ids` includes the eos or stop id that ended the row; `text` leaves special tokens and the
    stop out (`include_stop` keeps the stop, be it special or not). `stop_reason` is the stop string
    or stop id that ended it, None for eos and the rest. `seed` with n=1 repeats this very
    completion. `error` says why it ended with "error", and `error_code` which kind of EngineError
    that is, for programs.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None
    error_code: str | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a request took, and how many steps of the engine.

    Attributes:
        admitted, first_token, finished: seconds from its arrival; None where that never came.
        steps: in which its completions were, those that computed the prompt included.
        drafted_tokens: guessed tokens that were fed for its completions; see docs/speculation.md.
        accepted_tokens: of those, the ones that were then drawn.
    """

    admitted: float | None
    first_token: float | None
    finished: float
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything generated for one prompt.

    With best_of, `completions` are the n best, best first; each keeps its own `index`.
    `prompt_logprobs` has one entry a prompt token, the first one None, when asked for.
    """

    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    timings: Timings

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one streamed completion; `str(piece)` is its text.

    Text can come later than its tokens: bytes of an unfinished character, and text that may become
    a stop string, are held back. The last piece of a completion has `finish_reason`; if that is
    "error", also `error` and `error_code`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    error: str | None = None
    error_code: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities (nats) of a given text, token by token.

    The first token has no context, so its entry is None, and it does not count. `windows` is the
    number of forward windows: above 1 the text was longer than the context, and each window but the
    first saw only the half context before it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    windows: int

    @property
    def num_scored(self) -> int:
        return sum(logprob is not None for logprob in self.logprobs)

    @property
    def total_logprob(self) -> float:
        return math.fsum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability a token; NaN when nothing was scored."""
        return math.exp(-self.total_logprob / self.num_scored) if self.num_scored else math.nan
