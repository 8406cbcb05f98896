"""RequestLimits: what of a request is right, but more than one caller should have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from fastgen.checks import integer, real
from fastgen.errors import OptionError
from fastgen.sampling.params import SamplingParams

_VALUES = ("logit_bias_value", "temperature", "penalty")  # the other bounds are counts


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that a request may ask for; None: any amount. Every field is keyword-only.

    Attributes:
        n, best_of, max_new_tokens, logprobs, prompt_logprobs, temperature: of these options.
        prompt_tokens: length of the prompt.
        stop, stop_token_ids, logit_bias, allowed_token_ids: entries of these options.
        bad_words: token ids of all of them together (a string's once more behind a space).
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
        for limit, what, measure in _MEASURES:
            bound = getattr(self, limit)
            if bound is None:
                continue
            found = prompt_len if measure is None else measure(params)
            if found > bound:
                # `what` ends with the option's name
                option = "prompt" if measure is None else what.split()[-1]
                problem = f"{found} exceeds the limit of {bound}"
                raise OptionError(f"{what}: {problem}", option, problem)


_Measure = Callable[[SamplingParams], float]

# The limit, what it bounds in words, and how much of that there is; None: the prompt's tokens.
_MEASURES: tuple[tuple[str, str, _Measure | None], ...] = (
    ("n", "n", lambda params: params.n),
    ("best_of", "best_of", lambda params: params.best_of or 0),
    ("prompt_tokens", "prompt_tokens", None),
    ("max_new_tokens", "max_new_tokens", lambda params: params.max_new_tokens),
    ("stop", "strings in stop", lambda params: len(params.stop)),
    ("stop_bytes", "bytes of a string in stop", lambda params: max(_sizes(params), default=0)),
    ("stop_token_ids", "ids in stop_token_ids", lambda params: len(params.stop_token_ids)),
    ("logprobs", "logprobs", lambda params: params.logprobs or 0),
    ("prompt_logprobs", "prompt_logprobs", lambda params: params.prompt_logprobs or 0),
    ("logit_bias", "ids in logit_bias", lambda params: len(params.logit_bias)),
    ("logit_bias", "ids in sequence_bias",
     lambda params: sum(len(ids) for ids, _ in params.sequence_bias)),
    ("logit_bias_value", "a value in logit_bias", lambda params: _largest(params.logit_bias)),
    ("logit_bias_value", "a value in sequence_bias",
     lambda params: _largest(params.sequence_bias)),
    ("bad_words", "token ids in bad_words", lambda params: sum(map(len, params.bad_words))),
    ("allowed_token_ids", "ids in allowed_token_ids",
     lambda params: len(params.allowed_token_ids or ())),
    ("suppress_tokens", "ids in suppress_tokens", lambda params: len(params.suppress_tokens)),
    ("suppress_tokens", "ids in begin_suppress_tokens",
     lambda params: len(params.begin_suppress_tokens)),
    ("temperature", "temperature", lambda params: params.temperature),
    ("penalty", "presence_penalty", lambda params: abs(params.presence_penalty)),
    ("penalty", "frequency_penalty", lambda params: abs(params.frequency_penalty)),
)  # fmt: skip


def _sizes(params: SamplingParams) -> list[int]:
    return [len(stop.encode()) for stop in params.stop]


def _largest(biases: Iterable[tuple[object, float]]) -> float:
    return max((abs(bias) for _, bias in biases), default=0)
