"""The table of decoding options: everything that the project says of each stands here, once.

SamplingParams has a field for each row, in the same order. From the rows follow its checks, the
flags of `fastgen generate`, the server's fields and bounds, what the drop-in reads of transformers,
what samplers must know, and the tables in docs/sampling.md. CONTRIBUTING.md: how to add a filter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fastgen import checks
from fastgen.errors import OptionError
from fastgen.sampling import option_checks
from fastgen.sampling.option_checks import MAX_SAMPLES, Check, count

# What an option is about: the whole request; the logits, in the order of the rows; which tokens of
# a sampled row are left, in the order of the rows; how a row ends; what is told of its tokens.
Stage = Literal["request", "processor", "filter", "ending", "reporting"]
Schema = Mapping[str, Any]  # JSON schema; a Limit stands for a number that the server sets


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of `fastgen generate`; without a metavar it takes no value."""

    name: str
    help: str
    metavar: str = ""
    kind: Callable[[str], Any] = str
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """In a schema: the field of RequestLimits with this name, or its negative. None: no bound."""

    name: str
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """A field of RequestLimits that bounds `measure` of the option's value; `of` says of what."""

    limit: str
    of: str = ""
    measure: Callable[[Any], float] = lambda value: value


@dataclass(frozen=True, slots=True)
class Option:
    """One field of SamplingParams.

    Attributes:
        default: turns it off, but for `temperature`, whose 1 divides by nothing.
        check: see fastgen.sampling.option_checks. None is not checked where it is the default.
        meaning: what it does, in one line of Markdown.
        form: how the documentation writes it, where its name alone does not say enough.
        is_drawn: a draw depends on it. A sampler declares those that it knows; see `unknown_to`.
        flag: of the command line; None: it has none.
        schema: of the server's field; None: the server has none, or one of its own.
        server_name: what the server's protocol calls it.
        bounds: what a server bounds of it.
        transformers: classes of transformers that mean the same, in its order.
        attribute: where such a class of a filter keeps the value.
        elsewhere: other projects' names of it: what to say to who uses one.
    """

    stage: Stage
    name: str
    default: Any
    check: Check
    meaning: str
    form: str = ""
    is_drawn: bool = False
    flag: Flag | None = None
    schema: Schema | None = None
    server_name: str = ""
    bounds: tuple[Bound, ...] = ()
    transformers: tuple[str, ...] = ()
    attribute: str = ""
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def is_set(self, params: Any) -> bool:
        """Whether SamplingParams differ from the default here."""
        value = getattr(params, self.name)
        return value is not self.default and value != self.default


def unknown_to(known: Collection[str], params: Any) -> list[str]:
    """The options that are set in SamplingParams, that draws depend on, and that a sampler which
    knows `known` would ignore. Another sampler draws a row with one, or it is refused."""
    return [one.name for one in DRAWN if one.name not in known and one.is_set(params)]


def require_known(known: Collection[str], params: Any) -> None:
    """Raise OptionError for the first option that this sampler would ignore."""
    for name in unknown_to(known, params):
        raise OptionError(f"{name}: this sampler cannot draw with it", name)


def bias_of(argument: str) -> tuple[int, float]:
    """ID=VALUE on a command line."""
    token_id, _, value = argument.partition("=")
    return int(token_id), float(value)


_request = partial(Option, "request")
_processor = partial(Option, "processor", is_drawn=True)
_filter = partial(Option, "filter", is_drawn=True)
_ending = partial(Option, "ending")
_reporting = partial(Option, "reporting")


def _total_ids(biases: Any) -> int:
    return sum(len(ids) for ids, _ in biases)


def _largest(biases: Any) -> float:
    return max((abs(bias) for _, bias in biases), default=0)


def _longest(stops: Any) -> int:
    return max((len(stop.encode()) for stop in stops), default=0)


_COUNT: Schema = {"type": "integer", "minimum": 0}
_BOOLEAN: Schema = {"type": "boolean"}
_SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_BELOW_ONE: Schema = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_PENALTY: Schema = {
    "type": "number", "minimum": Limit("penalty", negative=True), "maximum": Limit("penalty"),
}  # fmt: skip
_STOP: Schema = {"type": "string", "maxLength": Limit("stop_bytes")}
_BIASES: Schema = {
    "type": "object",
    "maxProperties": Limit("logit_bias"),
    "additionalProperties": {
        "type": "number",
        "minimum": Limit("logit_bias_value", negative=True),
        "maximum": Limit("logit_bias_value"),
    },
}


def _ids(limit: str) -> Schema:
    return {"type": "array", "items": _COUNT, "maxItems": Limit(limit)}


OPTIONS: tuple[Option, ...] = (
    _request("n", 1, count(1, MAX_SAMPLES), "completions per prompt",
        flag=Flag("-n", "completions", "N", int),
        schema={"type": "integer", "minimum": 1, "maximum": Limit("n")},
        bounds=(Bound("n"),), elsewhere={"num_return_sequences": "n"}),
    _request("best_of", None, count(1, MAX_SAMPLES),
        "draw so many, return the `n` best: of the highest mean log-probability, or by `rank`",
        flag=Flag("--best-of", "draw so many, show the n with the best mean log-probability",
            "N", int),
        schema={"type": "integer", "minimum": 1, "maximum": Limit("best_of")},
        bounds=(Bound("best_of"),)),
    _request("speculate", True, checks.boolean,
        "decode several tokens a step where they can be guessed; no token depends on it",
        schema=_BOOLEAN),
    _request("rank", None, checks.function, "a function of yours that scores completions"),
    _request("max_new_tokens", 128, count(0), "at most so many new tokens",
        flag=Flag("--max-new-tokens", "at most so many", "N", int),
        schema={**_COUNT, "maximum": Limit("max_new_tokens")}, server_name="max_tokens",
        bounds=(Bound("max_new_tokens"),),
        elsewhere={"max_length": "max_new_tokens, without the prompt"}),
    _processor("logit_bias", (), option_checks.logit_bias, "added to the logit",
        form="logit_bias={id: bias}",
        flag=Flag("--logit-bias", "add to a token's logit", "ID=VALUE", bias_of, repeats=True),
        schema=_BIASES, transformers=("SequenceBiasLogitsProcessor",),
        bounds=(Bound("logit_bias", "ids in ", len),
                Bound("logit_bias_value", "a value in ", _largest))),
    _processor("sequence_bias", (), option_checks.sequence_bias,
        "added to the last id's logit where the text ends with the others",
        form="sequence_bias={(ids): bias}",
        schema=_BIASES, transformers=("SequenceBiasLogitsProcessor",),
        bounds=(Bound("logit_bias", "ids in ", _total_ids),
                Bound("logit_bias_value", "a value in ", _largest))),
    _processor("repetition_penalty", 1.0, option_checks.factor,
        "divides positive, multiplies negative logits of tokens in prompt or text",
        flag=Flag("--repetition-penalty", "against every token of the row; 1 is off", "R", float),
        schema={"type": "number", "exclusiveMinimum": 0},
        transformers=("RepetitionPenaltyLogitsProcessor",),
        elsewhere={"repeat_penalty": "repetition_penalty"}),
    _processor("frequency_penalty", 0.0, option_checks.penalty,
        "subtracted for each time a token was generated",
        flag=Flag("--frequency-penalty", "against them, for each time", "A", float),
        schema=_PENALTY, bounds=(Bound("penalty", measure=abs),)),
    _processor("presence_penalty", 0.0, option_checks.penalty,
        "subtracted once if a token was generated at all",
        flag=Flag("--presence-penalty", "against tokens that were generated", "A", float),
        schema=_PENALTY, bounds=(Bound("penalty", measure=abs),)),
    _processor("no_repeat_ngram_size", 0, count(0),
        "no sequence of so many tokens twice, prompt included",
        flag=Flag("--no-repeat-ngram-size", "no n tokens occur twice; 0 is off", "N", int),
        schema=_COUNT, transformers=("NoRepeatNGramLogitsProcessor",)),
    _processor("bad_words", (), option_checks.bad_words,
        "text, or lists of token ids, that are never completed",
        flag=Flag("--bad-word", "never complete the tokens of this text", "TEXT", repeats=True),
        schema={"type": "array", "items": {}, "maxItems": Limit("bad_words")},
        bounds=(Bound("bad_words", "token ids in ", lambda words: sum(map(len, words))),),
        transformers=("NoBadWordsLogitsProcessor",), elsewhere={"bad_words_ids": "bad_words"}),
    _processor("min_new_tokens", 0, count(0), "eos and stop ids are not drawn before",
        flag=Flag("--min-new-tokens", "do not end before", "N", int),
        schema=_COUNT, server_name="min_tokens",
        transformers=("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        elsewhere={"min_length": "min_new_tokens, without the prompt"}),
    _processor("allowed_token_ids", None, option_checks.allowed_token_ids, "nothing else is drawn",
        schema=_ids("allowed_token_ids"), bounds=(Bound("allowed_token_ids", "ids in ", len),)),
    _processor("exponential_decay_length_penalty", None, option_checks.length_penalty,
        "after `start` tokens ending becomes likelier",
        form="exponential_decay_length_penalty=(start, factor)",
        schema={"type": "array", "prefixItems": [_COUNT, {"type": "number"}],
                "minItems": 2, "maxItems": 2},
        transformers=("ExponentialDecayLengthPenalty",)),
    _processor("suppress_tokens", (), checks.token_ids, "never drawn",
        schema=_ids("suppress_tokens"), bounds=(Bound("suppress_tokens", "ids in ", len),),
        transformers=("SuppressTokensLogitsProcessor",)),
    _processor("begin_suppress_tokens", (), checks.token_ids, "not drawn first",
        schema=_ids("suppress_tokens"), bounds=(Bound("suppress_tokens", "ids in ", len),),
        transformers=("SuppressTokensAtBeginLogitsProcessor",)),
    _processor("logits_processor", None, checks.function, "a function of yours, see below"),
    _filter("temperature", 1.0, option_checks.temperature,
        "divides the logits first; 0 is greedy",
        flag=Flag("--temperature", "0 is greedy", "T", float),
        schema={"type": "number", "minimum": 0, "maximum": Limit("temperature")},
        bounds=(Bound("temperature"),),
        transformers=("TemperatureLogitsWarper",), attribute="temperature",
        elsewhere={"do_sample": "temperature: 0 is greedy, above 0 samples"}),
    _filter("top_n_sigma", 0.0, option_checks.deviations,
        "logits at most so many standard deviations below the highest",
        flag=Flag("--top-n-sigma",
            "from logits within so many standard deviations of the highest; 0 is off", "N", float),
        schema={"type": "number", "minimum": 0}, elsewhere={"nsigma": "top_n_sigma"}),
    _filter("top_h", None, option_checks.share,
        "of the 100 most likely, the first that hold this share of their entropy",
        flag=Flag("--top-h", "from the most likely that hold this share of their entropy",
            "H", float),
        schema=_SHARE, transformers=("TopHLogitsWarper",), attribute="top_h"),
    _filter("top_k", 0, option_checks.top_k, "the k highest, and all equals of the k-th",
        flag=Flag("--top-k", "draw from the k most likely tokens; 0 is off", "K", int),
        schema=_COUNT, transformers=("TopKLogitsWarper",), attribute="top_k"),
    _filter("top_p", 1.0, option_checks.share, "the smallest set with this probability",
        flag=Flag("--top-p", "from those that hold this probability; 1 is off", "P", float),
        schema=_SHARE, transformers=("TopPLogitsWarper",), attribute="top_p"),
    _filter("min_p", 0.0, option_checks.share_or_zero,
        "at least this share of the highest probability",
        flag=Flag("--min-p", "from those with this share of the highest probability; 0 is off",
            "P", float),
        schema={"type": "number", "minimum": 0, "maximum": 1},
        transformers=("MinPLogitsWarper",), attribute="min_p"),
    _filter("typical_p", 1.0, option_checks.share,
        "information nearest to the entropy, up to this probability",
        flag=Flag("--typical-p", "from the most typical, up to this probability; 1 is off",
            "P", float),
        schema=_SHARE, transformers=("TypicalLogitsWarper",), attribute="mass"),
    _filter("epsilon_cutoff", 0.0, option_checks.below_one, "at least this probability",
        flag=Flag("--epsilon-cutoff", "from those with at least this probability; 0 is off",
            "P", float),
        schema=_BELOW_ONE, transformers=("EpsilonLogitsWarper",), attribute="epsilon"),
    _filter("eta_cutoff", 0.0, option_checks.below_one,
        "at least this probability, or less where the entropy is high",
        flag=Flag("--eta-cutoff", "the same, lower where the entropy is high; 0 is off",
            "E", float),
        schema=_BELOW_ONE, transformers=("EtaLogitsWarper",), attribute="epsilon"),
    _ending("stop", (), option_checks.stop_strings, "text that ends a row",
        flag=Flag("--stop", "end there", "TEXT", repeats=True),
        schema={"oneOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": Limit("stop")}]},
        bounds=(Bound("stop", "strings in ", len),
                Bound("stop_bytes", "bytes of a string in ", _longest)),
        elsewhere={"stop_strings": "stop"}),
    _ending("stop_token_ids", (), checks.token_ids, "token ids that end a row, besides eos",
        is_drawn=True, flag=Flag("--stop-token-id", "end at this token", "ID", int, repeats=True),
        schema=_ids("stop_token_ids"), bounds=(Bound("stop_token_ids", "ids in ", len),),
        elsewhere={"eos_token_id": "stop_token_ids"}),
    _ending("include_stop", False, checks.boolean, "leave what ended the row in its text",
        flag=Flag("--include-stop", "show what ended the text"), schema=_BOOLEAN),
    _ending("ignore_eos", False, checks.boolean, "go on after eos", is_drawn=True,
        flag=Flag("--ignore-eos", "go on after the end of text"), schema=_BOOLEAN),
    _request("seed", None, count(0, 2**64 - 1), "repeats a result; a random one if omitted",
        is_drawn=True, flag=Flag("--seed", "to repeat a result (default: a new one)", "S", int),
        schema={**_COUNT, "maximum": 2**64 - 1}),
    _reporting("logprobs", None, count(0),
        "log-probabilities of each token, and of so many of the most likely",
        is_drawn=True, bounds=(Bound("logprobs"),),
        flag=Flag("--logprobs",
            "in the JSON, each token's log-probability and those of the k best", "K", int)),
    _reporting("prompt_logprobs", None, count(0), "the same for the prompt's tokens",
        bounds=(Bound("prompt_logprobs"),)),
)  # fmt: skip

BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}
PROCESSORS = tuple(option for option in OPTIONS if option.stage == "processor")
FILTERS = tuple(option for option in OPTIONS if option.stage == "filter")
DRAWN = tuple(option for option in OPTIONS if option.is_drawn)
ELSEWHERE = {name: ours for option in OPTIONS for name, ours in option.elsewhere.items()}
