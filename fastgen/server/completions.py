"""/v1/completions: what a request means, and what its results look like."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.checks import boolean, integer, real, reject_unknown
from fastgen.errors import EngineError, OptionError, OptionTypeError, about
from fastgen.results import Completion, Generation, Piece
from fastgen.sampling.options import OPTIONS, Option
from fastgen.sampling.params import SamplingParams
from fastgen.server.errors import ApiError, completion_error, unavailable
from fastgen.server.limits import ServerLimits
from fastgen.server.logprobs import LogprobsWriter
from fastgen.server.openai_values import translated
from fastgen.server.streaming import as_json
from fastgen.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
# The options of the sampler, by this protocol's names.
SAMPLING: dict[str, Option] = {
    option.server_name or option.name: option for option in OPTIONS if option.schema is not None
}
STREAM_OPTIONS = ["include_usage", "include_obfuscation"]
_ID = re.compile("0|[1-9][0-9]{0,9}")
_LONGEST_NAME = 64
LONGEST_SALT = 256  # characters
_BAD_TEXT = 16_384  # characters of all bad words: some 50 ms, for which other requests wait
# What is not the sampler's.
OTHERS = ("model", "prompt", "stream", "stream_options", "logprobs", "echo", "suffix", "user",
          "timeout", "priority", "cache_salt", "return_token_ids",
          "add_special_tokens")  # fmt: skip


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request that has been understood; the sampling options are checked, the ids are not."""

    model: str
    prompts: list[Any]  # each a string or a list of ids; an empty one begins a new document
    params: SamplingParams
    stream: bool
    include_usage: bool
    echo: bool
    return_token_ids: bool
    add_special_tokens: bool  # to prompts that are texts
    timeout: float
    priority: int
    cache_salt: str | None

    @property
    def shows_prompt_logprobs(self) -> bool:
        return self.echo and self.params.logprobs is not None

    @property
    def needs_prompt_text(self) -> bool:
        """To show it, or because offsets of log-probabilities count from its beginning."""
        return self.echo or self.params.logprobs is not None


def completion_request(body: dict[str, Any], limits: ServerLimits) -> CompletionRequest:
    """Raises OptionTypeError, OptionError or ApiError where it cannot be understood."""
    given = without_nulls(body)
    check_names(given, [*SAMPLING, *OTHERS])
    if given.get("suffix", "") != "":
        raise ApiError(400, "suffix: this model cannot insert text, only continue it", "suffix")
    text("user", given.get("user", ""))
    echo = boolean("echo", given.get("echo", False))
    stream = boolean("stream", given.get("stream", False))
    params = _params(given, echo, limits)
    if stream and params.best_of is not None:
        raise ApiError(400, "best_of cannot be streamed: it chooses when all is there", "best_of")
    return CompletionRequest(
        model=text("model", given.get("model", "")),
        prompts=prompts_of(given.get("prompt"), limits.prompts),
        params=params,
        stream=stream,
        include_usage=_include_usage(given.get("stream_options"), stream),
        echo=echo,
        return_token_ids=boolean("return_token_ids", given.get("return_token_ids", False)),
        add_special_tokens=boolean("add_special_tokens", given.get("add_special_tokens", False)),
        timeout=timeout_of(given, limits),
        priority=integer("priority", given.get("priority", 0), 0, 1000),
        cache_salt=text("cache_salt", given["cache_salt"]) if "cache_salt" in given else None,
    )


def _params(given: dict[str, Any], echo: bool, limits: ServerLimits) -> SamplingParams:
    options = {option.name: given[name] for name, option in SAMPLING.items() if name in given}
    options = translated(options)
    options.setdefault("max_new_tokens", DEFAULT_MAX_TOKENS)
    for name in ("logit_bias", "sequence_bias"):
        if name in options:
            options[name] = _biases(name, options[name])
    _check_bad_text(options.get("bad_words"))
    best_of = options.get("best_of")
    if type(best_of) is int and best_of == options.get("n", 1):
        del options["best_of"]  # there is nothing to choose
    if "logprobs" in given:
        most = limits.completion_logprobs
        options["logprobs"] = integer("logprobs", given["logprobs"], 0, most)
        if echo:
            options["prompt_logprobs"] = options["logprobs"]
    if options["max_new_tokens"] == 0 and type(options["max_new_tokens"]) is int:
        options.setdefault("prompt_logprobs", 0)  # without them there would be nothing to run
    return SamplingParams(**options)


def _check_bad_text(words: Any) -> None:
    """Long text is refused before it is encoded, not when it turns out to be too many tokens."""
    texts = [words] if isinstance(words, str) else words if isinstance(words, list) else []
    size = sum(len(word) for word in texts if isinstance(word, str))
    if size > _BAD_TEXT:
        told = f"bad_words: {size} characters exceed the limit of {_BAD_TEXT}"
        raise ApiError(400, told, "bad_words")


def _biases(name: str, value: Any) -> Any:
    """JSON's keys are strings: ids, or for sequence_bias ids with commas between them."""
    if not isinstance(value, dict):
        raise OptionTypeError(f"{name} must be an object, not {type(value).__name__}", name)
    if name == "logit_bias":
        return {_id(name, key): bias for key, bias in value.items()}
    return {tuple(_id(name, part) for part in key.split(",")): bias for key, bias in value.items()}


def _id(name: str, key: str) -> int:
    """In one form only, so that no two keys are the same id."""
    if not _ID.fullmatch(key):
        raise OptionError(f"{name} must have token ids as its keys", name)
    return int(key)


def prompts_of(prompt: Any, most: int) -> list[Any]:
    """A string, a list of ids, or a list of either, as a list of prompts; None is an empty one."""
    if prompt is None:
        return [[]]
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        told = f"prompt must be a string or a list, not {type(prompt).__name__}"
        raise OptionTypeError(told, "prompt")
    if not prompt:
        raise ApiError(400, "prompt is an empty list", "prompt")
    if isinstance(prompt[0], (str, list)):
        if len(prompt) > most:
            raise ApiError(400, f"prompt: {len(prompt)} exceed the limit of {most}", "prompt")
        if not all(isinstance(one, type(prompt[0])) for one in prompt):
            raise ApiError(400, "prompt must hold either texts or lists of token ids", "prompt")
        return prompt
    return [prompt]


def timeout_of(given: dict[str, Any], limits: ServerLimits) -> float:
    most = limits.request_timeout
    return real("timeout", given.get("timeout", most), 0, most, above=True)


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """A field that is null is as good as absent."""
    return {name: value for name, value in body.items() if value is not None}


def check_names(given: dict[str, Any], known: list[str]) -> None:
    """As reject_unknown; a very long name is not compared with others."""
    for name in given:
        if len(name) > _LONGEST_NAME:
            raise ApiError(400, f"unknown option {name[:_LONGEST_NAME]!r}...")
    reject_unknown(given, known)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionTypeError(f"{name} must be a string, not {type(value).__name__}", name)
    return value


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options is only of use with stream", "stream_options")
    if not isinstance(options, dict):
        told = f"stream_options must be an object, not {type(options).__name__}"
        raise OptionTypeError(told, "stream_options")
    given = without_nulls(options)
    check_names(given, STREAM_OPTIONS)
    with about("stream_options"):
        for name, value in given.items():
            boolean(f"stream_options.{name}", value)
    return bool(given.get("include_usage", False))


def check_answer(asked: CompletionRequest, max_seq_len: int, limits: ServerLimits) -> None:
    """Raise ApiError for an answer that would hold too many log-probabilities."""
    logprobs, params = asked.params.logprobs, asked.params
    if logprobs is None:
        return
    tokens = 0
    for prompt in asked.prompts:  # a token is a character at least
        echoed = len(prompt) if asked.echo else 0
        tokens += min(echoed + params.max_new_tokens, max_seq_len)
    values = tokens * params.n * (1 + logprobs)
    if values > limits.answer_logprobs:
        told = f"up to {values} in the answer exceed the limit of {limits.answer_logprobs}"
        raise ApiError(400, f"logprobs: {told}", "logprobs")


class Answer:
    """What all objects of one response have in common."""

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer | None) -> None:
        self.id = f"cmpl-{secrets.token_hex(16)}"
        self._request, self._tokenizer = request, tokenizer
        self._created = int(time.time())

    def whole(self, generations: Sequence[Generation]) -> bytes:
        """The response of a request that does not stream, as JSON.

        Choices are written one by one: json lets no other thread run meanwhile.
        """
        usage = usage_of(
            (len(generation.prompt_token_ids) for generation in generations),
            (len(c.token_ids) for generation in generations for c in generation.completions),
        )
        shell = as_json(self.object([]) | {"usage": usage})
        choices = b",".join(map(as_json, self._choices(generations)))
        return shell.replace(b'"choices":[]', b'"choices":[' + choices + b"]", 1)

    def _choices(self, generations: Sequence[Generation]) -> Iterator[dict[str, Any]]:
        index = 0
        for prompt, generation in zip(self._request.prompts, generations, strict=True):
            before = self.prompt_text(prompt) if self._request.needs_prompt_text else ""
            for completion in generation.completions:
                yield self._choice(index, before, generation, completion)
                index += 1

    def object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }

    def prompt_text(self, prompt: Any) -> str:
        """As the caller wrote it; of ids, what they stand for."""
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(prompt, skip_special_tokens=False)

    def _choice(
        self, index: int, before: str, generation: Generation, completion: Completion
    ) -> dict[str, Any]:
        """`before`: the prompt's text, if it is needed."""
        refuse_failed(completion)
        writer = LogprobsWriter(self._tokenizer)
        if self._request.shows_prompt_logprobs:
            prompt_logprobs = generation.prompt_logprobs or ()
            writer.add_prompt(before, generation.prompt_token_ids, prompt_logprobs)
        else:
            writer.skip(before)
        if completion.logprobs is not None:
            writer.add(completion.logprobs)
        choice = {
            "index": index,
            "text": (before if self._request.echo else "") + completion.text,
            "logprobs": None if self._request.params.logprobs is None else writer.take(),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "seed": completion.seed,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice


def refuse_failed(ended: Completion | Piece) -> None:
    """Raise ApiError for a completion that failed."""
    if ended.finish_reason == "cancelled":
        raise unavailable()
    if ended.finish_reason == "error":
        message = ended.error or ""
        raise completion_error(ended.error_code, message) from EngineError(message)  # for the log


def usage_of(prompts: Any, completions: Any) -> dict[str, int]:
    prompt_tokens, completion_tokens = sum(prompts), sum(completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
