"""What a caller asks for, checked and in token ids: jobs, as an engine takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgen.checkpoints.config import GPT2Config
from fastgen.engine.engine import Engine
from fastgen.engine.requests import Request
from fastgen.errors import (
    OptionError,
    OptionTypeError,
    about,
    code_of,
    ended_early,
    message_of,
    row_failed,
)
from fastgen.frontends.codec import RequestCodec
from fastgen.frontends.prompts import Params, Prompt, as_list, is_one, params_for, to_list
from fastgen.frontends.scoring import joined_score, windows_of
from fastgen.results import Generation, Score
from fastgen.sampling.params import SamplingParams
from fastgen.text.detokenizer import TextSink
from fastgen.text.tokenizer import Tokenizer


class Job(NamedTuple):
    """One prompt, as Engine.add_request takes it."""

    token_ids: Sequence[int]
    params: SamplingParams
    sinks: list[TextSink] | None


@dataclass(frozen=True, slots=True)
class Scoring:
    """Texts to be scored: one job for each window of each of them, in order."""

    token_ids: list[list[int]]
    windows: list[list[tuple[int, Sequence[int]]]]

    @property
    def jobs(self) -> list[Job]:
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        return [Job(tokens, params, None) for each in self.windows for _, tokens in each]

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """Of the jobs' requests, which are done.

        Raises:
            RowFailedError, RequestTimeoutError, RequestCancelledError: one was not scored to its
                end.
        """
        for [row] in (request.rows for request in requests):
            if row.error is not None:
                told = f"scoring failed: {message_of(row.error)}"
                raise row_failed(told, code_of(row.error)) from row.error
            if row.finish_reason in ("cancelled", "timeout"):
                raise ended_early(f"scoring failed: {row.finish_reason}", row.finish_reason)
        scored = iter(requests)
        return [
            joined_score(token_ids, [(start, next(scored)) for start, _ in each])
            for token_ids, each in zip(self.token_ids, self.windows, strict=True)
        ]


class JobMaker:
    """Makes jobs for one model. Thread-safe; encoding long texts takes long."""

    def __init__(
        self, config: GPT2Config, tokenizer: Tokenizer | None, engine: Engine, max_seq_len: int
    ) -> None:
        self._engine, self._max_seq_len = engine, max_seq_len
        self._codec = RequestCodec(config, tokenizer)

    def jobs(self, prompts: Any, params: Params, options: dict[str, Any]) -> Iterator[Job]:
        """One a prompt. All are checked now; sinks are made as the jobs are taken.

        Raises:
            TypeError, ValueError: a prompt or option is wrong.
        """
        many = as_list(prompts)
        return self._jobs(many, params_for(len(many), params, options))

    def streamed(
        self, prompt: Prompt, params: SamplingParams | None, options: dict[str, Any]
    ) -> Job:
        """The job of one prompt whose text is read while it is generated."""
        if not is_one(prompt) and to_list(prompt):
            raise OptionTypeError("stream takes one prompt; use generate for several", "prompt")
        [chosen] = params_for(1, params, options)
        if chosen.selects_best:
            told = "best_of chooses when all completions are there: use generate"
            raise OptionError(told, "best_of")
        [job] = self._jobs([prompt], [chosen], streams=True)
        return job

    def scoring(self, texts: Any) -> Scoring:
        with about("text"):
            ids = self._codec.token_ids(as_list(texts))
        for index, token_ids in enumerate(ids):
            with about(where=_place("text", index, len(ids))):
                self._engine.check_ids("text", token_ids)
        return Scoring(ids, [windows_of(token_ids, self._max_seq_len) for token_ids in ids])

    def start(self) -> list[int]:
        """The id from which an empty prompt continues; see RequestCodec.start."""
        return self._codec.start()

    def generation(self, request: Request) -> Generation:
        """Of a request that is done."""
        return self._codec.generation(request)

    def _jobs(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams], *, streams: bool = False
    ) -> Iterator[Job]:
        each = list(self._codec.params_of_ids(params))
        encoded: list[tuple[int, ...]] = []
        with about("prompt"):
            found = self._codec.token_ids(prompts, self._max_seq_len)
        for index, ids in enumerate(found):
            with about(where=_place("prompt", index, len(prompts))):
                prompt = ids or self._codec.start()
                encoded.append(self._engine.check_request(prompt, each[index]))
        return (
            Job(ids, chosen, self._codec.sinks(chosen, streams=streams))
            for ids, chosen in zip(encoded, each, strict=True)
        )


def _place(what: str, index: int, count: int) -> str:
    """Which of several a message is about."""
    return f"{what} {index}: " if count > 1 else ""
