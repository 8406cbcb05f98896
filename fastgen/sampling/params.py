"""SamplingParams: how one row is decoded. Frozen, and checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastgen.checks import reject_unknown
from fastgen.errors import OptionError, OptionTypeError
from fastgen.sampling.options import BY_NAME, ELSEWHERE, OPTIONS

LogitsProcessor = Callable[[Any, Any], Any]  # (token_ids, logits) -> logits, NumPy arrays
Rank = Callable[[Any], Sequence[float]]  # completions -> a score for each


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding options of one request. Every field is keyword-only.

    Options that change logits act in the order in which they stand here, in transformers' sense of
    each; only a sampled row is filtered, and each filter looks at what those before it left.
    "Ending ids" are the eos ids, unless ignored, and `stop_token_ids`.

    Attributes:
        n: completions per prompt; sample j > 0 draws with a seed of its own, derived from `seed`.
        best_of: draw this many completions and return the n best: those with the highest mean
            log-probability a token, or the highest scores that `rank` gives. None: n.
        speculate: decode several tokens a step where they can be guessed; no token depends on it.
        rank: a function of the tuple of all best_of Completions; returns one score for each.
        max_new_tokens: upper bound of new tokens; a row also ends where the context does.

        logit_bias: {token id: what to add to its logit}.
        sequence_bias: {(token ids): what to add to the last one's logit where the row ends with the
            others}. What is added to one logit is summed first.
        repetition_penalty: logits of tokens in the row, prompt included, are divided by it if they
            are positive and multiplied if negative; 1 is off.
        frequency_penalty, presence_penalty: subtracted from the logit of a token for each time that
            it was generated, and once if it was generated at all (OpenAI's formula).
        no_repeat_ngram_size: no sequence of so many tokens occurs twice in the row; 0 is off.
        bad_words: strings or lists of token ids that are never completed. A string stands for the
            tokens of its text with and without a leading space; other cuts are not covered.
        min_new_tokens: until there are so many, ending ids are not drawn. Stop strings still end.
        allowed_token_ids: only these are drawn; if all of them were ruled out, any of them.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens the logits of
            ending ids rise by their absolute value times factor ** (tokens since) - 1.
        suppress_tokens, begin_suppress_tokens: ids that are never drawn, or not as first new token.
        logits_processor: a function of (token_ids, logits), NumPy arrays int64 (T,) and float32
            (V,), called within the step for each token of this row; returns the logits, or None
            having changed the array that it was given. What it raises ends its row with "error".

        temperature: divides the logits; 0 is greedy: the highest logit, of equals the lowest id.
        top_n_sigma: keep logits at most so many standard deviations below the highest; 0 keeps all.
        top_h: keep the most likely tokens, of the best 100, that hold this share of their entropy.
        top_k: keep the k highest logits and all equals of the k-th; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        min_p: keep tokens with at least this share of the highest probability; 0 keeps all.
        typical_p: keep those whose information is nearest to the entropy, up to this mass; 1: all.
        epsilon_cutoff: keep tokens with at least this probability; 0 keeps all.
        eta_cutoff: the same with min(eta, sqrt(eta) * exp(-entropy)); 0 keeps all.

        stop: string, or strings, that end a row when its text contains them.
        stop_token_ids: token ids that end a row, besides eos.
        include_stop: leave the stop string, or the stop token's text, in the text.
        ignore_eos: go on after eos.
        seed: 64-bit seed; None draws one, and every Completion says which.
        logprobs: with each token its log-probability and those of the `logprobs` most likely
            tokens (0: its own only); None: none. Of the raw logits, before all of the above.
        prompt_logprobs: the same for the prompt's tokens.

    Raises:
        OptionTypeError (a TypeError): a value of the wrong type, or an unknown option (the nearest
            known one is named).
        OptionError (a ValueError): a value out of range.
    """

    n: int = 1
    best_of: int | None = None
    speculate: bool = True
    rank: Rank | None = None
    max_new_tokens: int = 128
    logit_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    logits_processor: LogitsProcessor | None = None
    temperature: float = 1.0
    top_n_sigma: float = 0.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if args:
            told = "SamplingParams takes keyword options only, e.g. temperature=0.8"
            raise OptionTypeError(told)
        for name in options:
            if name in ELSEWHERE:
                told = f"unknown option {name!r}; here it is {ELSEWHERE[name]}"
                raise OptionTypeError(told, name)
        reject_unknown(options, BY_NAME)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                object.__setattr__(self, option.name, option.check(option.name, value))
        self._check_together()

    def _check_together(self) -> None:
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            told = "max_new_tokens=0 generates nothing; it needs prompt_logprobs"
            raise OptionError(told, "max_new_tokens")
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={self.min_new_tokens} exceeds"
                f" max_new_tokens={self.max_new_tokens}",
                "min_new_tokens",
                f"{self.min_new_tokens} exceeds the most new tokens, {self.max_new_tokens}",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise OptionError(f"best_of={self.best_of} is less than n={self.n}", "best_of")
        if self.rank is not None and self.best_of is None:
            raise OptionError("rank chooses among best_of completions: it needs best_of", "rank")
        allowed = self.allowed_token_ids
        if allowed is not None and set(allowed) <= set(self.suppress_tokens):
            told = "allowed_token_ids holds nothing that suppress_tokens leaves"
            raise OptionError(told, "allowed_token_ids")

    @property
    def num_rows(self) -> int:
        """Completions that are drawn."""
        return self.n if self.best_of is None else self.best_of

    @property
    def selects_best(self) -> bool:
        """Whether all completions are drawn before any can be returned, to return the best."""
        return self.best_of is not None

    def with_seed(self, seed: int) -> SamplingParams:
        """A copy with this seed; nothing is checked again."""
        copy = object.__new__(SamplingParams)
        copy.__dict__.update(self.__dict__, seed=seed)
        return copy

    def ending_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """The ids that end a row, of a model with these eos ids."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | eos_ids

    @property
    def id_fields(self) -> dict[str, Sequence[int]]:
        """Every option that holds token ids, with its ids."""
        words = [word for word in self.bad_words if not isinstance(word, str)]
        return {
            "logit_bias": [token_id for token_id, _ in self.logit_bias],
            "sequence_bias": [token_id for ids, _ in self.sequence_bias for token_id in ids],
            "bad_words": [token_id for word in words for token_id in word],
            "allowed_token_ids": self.allowed_token_ids or (),
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
            "stop_token_ids": self.stop_token_ids,
        }
