"""SamplingParams: how one row is decoded. Frozen, and checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from fastgen.checks import (
    boolean,
    function,
    integer,
    is_integer,
    real,
    reject_unknown,
    sequence,
    text,
    token_ids,
)
from fastgen.errors import OptionError, OptionTypeError

MIN_TEMPERATURE = 1e-6  # below it, logits / temperature can overflow float32
MAX_SAMPLES = 2**16  # each keeps its tokens until the last has ended
MAX_PENALTY = 1e6
MAX_LOGIT_BIAS = 1e10

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
        rank: a function of the tuple of all best_of Completions; returns one score for each.
        max_new_tokens: upper bound of new tokens; a row also ends where the context does.
        min_new_tokens: until there are so many, ending ids are not drawn. Stop strings still end.

        logit_bias: {token id: what to add to its logit}.
        sequence_bias: {(token ids): what to add to the last one's logit where the row ends with the
            others}. What is added to one logit is summed first.
        repetition_penalty: logits of tokens in the row, prompt included, are divided by it if they
            are positive and multiplied if negative; 1 is off.
        frequency_penalty, presence_penalty: subtracted from the logit of a token for each time that
            it was generated, and once if it was generated at all (OpenAI's formula).
        no_repeat_ngram_size: no sequence of so many tokens occurs twice in the row; 0 is off.
        bad_words: strings or lists of token ids that are never completed. A string stands for the
            tokens of its text as it is and behind a space; other ways to cut it are not covered.
        allowed_token_ids: only these are drawn; if all of them were ruled out, any of them.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens the logits of
            ending ids rise by their absolute value times factor ** (tokens since) - 1.
        suppress_tokens, begin_suppress_tokens: ids that are never drawn, or not as first new token.
        logits_processor: a function of (token_ids, logits), NumPy arrays int64 (T,) and float32
            (V,), called within the step for each token of this row; returns the logits, or None
            having changed the array that it was given. What it raises ends its row with "error".

        temperature: divides the logits; 0 is greedy: the highest logit, of equals the lowest id.
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
        TypeError: a value of the wrong type, or an unknown option (the nearest known one is named).
        ValueError: a value out of range.
    """

    n: int = 1
    best_of: int | None = None
    rank: Rank | None = None
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    logits_processor: LogitsProcessor | None = None
    temperature: float = 1.0
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
            raise OptionTypeError("SamplingParams takes keyword options only, e.g. temperature=0.8")
        for name in options:
            if name in _ELSEWHERE:
                raise OptionTypeError(
                    f"unknown option {name!r}; here it is {_ELSEWHERE[name]}", name
                )
        reject_unknown(options, (field.name for field in fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        for name, check in _OPTIONAL_CHECKS.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise OptionError(
                "max_new_tokens=0 generates nothing; it needs prompt_logprobs", "max_new_tokens"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={self.min_new_tokens} exceeds "
                f"max_new_tokens={self.max_new_tokens}",
                "min_new_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise OptionError(f"best_of={self.best_of} is less than n={self.n}", "best_of")
        if self.rank is not None and self.best_of is None:
            raise OptionError("rank chooses among best_of completions: it needs best_of", "rank")
        allowed = self.allowed_token_ids
        if allowed is not None and set(allowed) <= set(self.suppress_tokens):
            raise OptionError(
                "allowed_token_ids holds nothing that suppress_tokens leaves", "allowed_token_ids"
            )

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


def _temperature(name: str, value: Any) -> float:
    temperature = real(name, value, 0, 1e6)
    if 0 < temperature < MIN_TEMPERATURE:
        raise OptionError(
            f"{name} must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, not {value}", name
        )
    return temperature


def _top_k(name: str, value: Any) -> int:
    if is_integer(value) and value == -1:
        raise OptionError(f"{name} must be at least 0, which keeps all, not -1", name)
    return integer(name, value, 0)


def _biases(name: str, value: Any, key_of: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else sequence(name, value)
    biases: dict[Any, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise OptionTypeError(f"{name} must be a mapping of token ids to numbers", name)
        key = key_of(name, pair[0])
        biases[key] = real(f"a value in {name}", pair[1], -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return tuple(biases.items())


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    return _biases(name, value, lambda name, key: integer(f"a token id in {name}", key, 0))


def _sequence_bias(name: str, value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    return _biases(name, value, _word)


def _word(name: str, value: Any) -> tuple[int, ...]:
    ids = tuple(integer(name, item, 0) for item in sequence(name, value))
    if not ids:
        raise OptionError(f"{name} must not hold an empty word", name)
    return ids


def _bad_words(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in (value,) if isinstance(value, str) else sequence(name, value):
        if isinstance(word, str):
            words.append(text(name, word))
            continue
        if is_integer(word):
            raise OptionTypeError(
                f"{name} must hold strings or lists of token ids, not an integer", name
            )
        words.append(_word(name, word))
    return tuple(dict.fromkeys(words))


def _allowed_token_ids(name: str, value: Any) -> tuple[int, ...]:
    allowed = token_ids(name, value)
    if not allowed:
        raise OptionError(f"{name} must allow at least one token; None allows all", name)
    return allowed


def _length_penalty(name: str, value: Any) -> tuple[int, float]:
    pair = sequence(name, value)
    if len(pair) != 2:
        raise OptionError(f"{name} must be a pair (start, factor), not {len(pair)} values", name)
    start = integer(f"start in {name}", pair[0], 0)
    return start, real(f"factor in {name}", pair[1], 1e-6, MAX_PENALTY)


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else sequence(name, value)
    for stop in stops:
        if not isinstance(stop, str):
            raise OptionTypeError(f"{name} must hold strings, not {type(stop).__name__}", name)
        text(name, stop)
    return tuple(dict.fromkeys(stops))


def _share(name: str, value: Any) -> float:
    return real(name, value, 0, 1, above=True)


def _below_one(name: str, value: Any) -> float:
    cutoff = real(name, value, 0, 1)
    if cutoff == 1:
        raise OptionError(f"{name} must be at least 0 (off) and below 1, not 1", name)
    return cutoff


def _penalty(name: str, value: Any) -> float:
    return real(name, value, -MAX_PENALTY, MAX_PENALTY)


def _count(low: int, high: int = 2**31 - 1) -> Callable[[str, Any], int]:
    return lambda name, value: integer(name, value, low, high)


# Options that peers call by another name.
_ELSEWHERE = {
    "do_sample": "temperature: 0 is greedy, above 0 samples",
    "max_length": "max_new_tokens, without the prompt",
    "min_length": "min_new_tokens, without the prompt",
    "num_return_sequences": "n",
    "eos_token_id": "stop_token_ids",
    "bad_words_ids": "bad_words",
    "stop_strings": "stop",
    "repeat_penalty": "repetition_penalty",
}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "n": _count(1, MAX_SAMPLES),
    "max_new_tokens": _count(0),
    "min_new_tokens": _count(0),
    "logit_bias": _logit_bias,
    "sequence_bias": _sequence_bias,
    "repetition_penalty": lambda name, value: real(name, value, 1 / MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "no_repeat_ngram_size": _count(0),
    "bad_words": _bad_words,
    "suppress_tokens": token_ids,
    "begin_suppress_tokens": token_ids,
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _share,
    "min_p": lambda name, value: real(name, value, 0, 1),
    "typical_p": _share,
    "epsilon_cutoff": _below_one,
    "eta_cutoff": _below_one,
    "stop": _stop_strings,
    "stop_token_ids": token_ids,
    "include_stop": boolean,
    "ignore_eos": boolean,
}
_OPTIONAL_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "best_of": _count(1, MAX_SAMPLES),
    "rank": function,
    "allowed_token_ids": _allowed_token_ids,
    "exponential_decay_length_penalty": _length_penalty,
    "logits_processor": function,
    "top_h": _share,
    "seed": _count(0, 2**64 - 1),
    "logprobs": _count(0),
    "prompt_logprobs": _count(0),
}
