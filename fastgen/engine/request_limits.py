"""RequestLimits: what of a request is right, but more than one caller should have."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastgen.checks import integer, real
from fastgen.errors import OptionError
from fastgen.sampling.options import OPTIONS
from fastgen.sampling.params import SamplingParams

_VALUES = ("logit_bias_value", "temperature", "penalty")  # the other bounds are counts


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that a request may ask for; None: any amount. Every field is keyword-only.

    Attributes:
        n, best_of, max_new_tokens, logprobs, prompt_logprobs, temperature: of these options.
        prompt_tokens: length of the prompt.
        stop, stop_token_ids, logit_bias, allowed_token_ids: entries of these options.
        bad_words: token ids of all of them together (a string's also with a leading space).
        suppress_tokens: entries of suppress_tokens, and of begin_suppress_tokens.
        stop_bytes: length of a stop string in UTF-8.
        logit_bias_value: absolute value of a bias.
        penalty: absolute value of presence_penalty and of frequency_penalty.

    Raises:
        TypeError, ValueError: a bound is not a number, or negative.
    """

    n: int | None = None
    best_of: int | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    stop: int | None = None
    stop_bytes: int | None = None
    stop_token_ids: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: int | None = None
    logit_bias_value: float | None = None
    bad_words: int | None = None
    allowed_token_ids: int | None = None
    suppress_tokens: int | None = None
    temperature: float | None = None
    penalty: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            bound = getattr(self, field.name)
            if bound is None:
                continue
            if field.name in _VALUES:
                object.__setattr__(self, field.name, real(field.name, bound, 0, float("inf")))
            else:
                object.__setattr__(self, field.name, integer(field.name, bound, 0))

    @classmethod
    def for_serving(cls) -> RequestLimits:
        """What a server allows strangers: OpenAI's bounds, and for the rest those of its peers.

        How long a prompt may be, and what follows it, is up to the model's context.
        """
        return cls(
            n=128,
            best_of=20,
            stop=4,
            stop_bytes=256,
            stop_token_ids=128,
            logprobs=20,  # chat's top_logprobs; completions' logprobs, 5, are the server's to check
            prompt_logprobs=5,  # only completions have them
            logit_bias=1024,
            logit_bias_value=100,
            bad_words=1024,
            allowed_token_ids=1024,
            suppress_tokens=1024,
            temperature=2,
            penalty=2,
        )

    def check(self, prompt_len: int, params: SamplingParams) -> None:
        """Raise OptionError for the first bound that a request exceeds, naming what exceeds it."""
        if self.prompt_tokens is not None:
            _check("prompt", "prompt_tokens", prompt_len, self.prompt_tokens)
        for option in _BOUNDED:
            value = getattr(params, option.name)
            for bound in option.bounds if value is not None else ():
                most = getattr(self, bound.limit)
                if most is not None:
                    _check(option.name, bound.of + option.name, bound.measure(value), most)


_BOUNDED = tuple(option for option in OPTIONS if option.bounds)


def _check(option: str, what: str, found: float, most: float) -> None:
    if found > most:
        problem = f"{found} exceeds the limit of {most}"
        raise OptionError(f"{what}: {problem}", option, problem)
