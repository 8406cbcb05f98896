"""RequestCodec: text and options to ids, rows to completions. A model may have no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastgen.checkpoints.config import GPT2Config
from fastgen.engine.requests import Request, Row
from fastgen.errors import OptionError, about, code_of, message_of
from fastgen.frontends.prompts import to_list
from fastgen.frontends.ranking import best
from fastgen.results import Completion, Generation
from fastgen.sampling.params import SamplingParams
from fastgen.text.detokenizer import TextSink
from fastgen.text.tokenizer import Tokenizer


class RequestCodec:
    """Prompts, bad words and stop strings on their way in, completions on their way out."""

    def __init__(self, config: GPT2Config, tokenizer: Tokenizer | None) -> None:
        self._config, self._tokenizer = config, tokenizer

    def token_ids(self, prompts: Sequence[Any], max_tokens: int | None = None) -> list[list[int]]:
        """Ids of strings and of lists of ids; strings that are certainly too long are refused."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        from_text = iter(self._encode(texts, max_tokens))
        return [next(from_text) if isinstance(p, str) else to_list(p) for p in prompts]

    def start(self) -> list[int]:
        """The id from which an empty prompt continues: bos, else eos."""
        candidates = (self._config.bos_token_id, *self._config.eos_token_ids)
        for token_id in candidates:
            if token_id is not None:
                return [token_id]
        told = "the prompt is empty, and the model has no bos or eos token to start from"
        raise OptionError(told, "prompt")

    def params_of_ids(self, each: Sequence[SamplingParams]) -> Iterator[SamplingParams]:
        """The same with token ids for text in bad_words; one given many times is encoded once."""
        known: dict[int, SamplingParams] = {}
        for params in each:
            if id(params) not in known:
                known[id(params)] = self._without_text(params)
            yield known[id(params)]

    def _without_text(self, params: SamplingParams) -> SamplingParams:
        words = [word for word in params.bad_words if isinstance(word, str)]
        if not words:
            return params
        if self._tokenizer is None:
            raise OptionError(
                "bad_words holds text, but this model has no tokenizer; give lists of token ids",
                "bad_words",
            )
        encoded = [word for word in params.bad_words if not isinstance(word, str)]
        for word in words:
            with about("bad_words"):
                ways = [tuple(ids) for ids in self._tokenizer.encode([word, f" {word}"]) if ids]
            if not ways:
                told = f"bad_words holds {word!r}, for which this model has no tokens"
                raise OptionError(told, "bad_words")
            encoded += ways
        return replace(params, bad_words=tuple(encoded))

    def sinks(self, params: SamplingParams, *, streams: bool = False) -> list[TextSink] | None:
        """One sink for each row, if text is needed while it is generated."""
        if self._tokenizer is None:
            if params.stop:
                told = "stop strings need text, but this model has no tokenizer"
                raise OptionError(told, "stop")
            return None
        if not (streams or params.stop):
            return None
        return [
            self._tokenizer.sink(params.stop, include_stop=params.include_stop)
            for _ in range(params.num_rows)
        ]

    def generation(self, request: Request) -> Generation:
        """The Generation of a request that is done."""
        completions = best(tuple(map(self._completion, request.rows)), request.params)
        if request.params.selects_best and request.params.logprobs is None:
            completions = tuple(replace(chosen, logprobs=None) for chosen in completions)
        prompt_logprobs = request.prompt_logprobs
        return Generation(
            prompt_token_ids=request.prompt_token_ids,
            completions=completions,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            timings=request.timings,
        )

    def _completion(self, row: Row) -> Completion:
        assert row.finish_reason is not None and row.params.seed is not None
        error, text = row.error, ""
        try:
            text = self._text(row)
        except Exception as undecoded:
            error = undecoded if error is None else error
        return Completion(
            index=row.index,
            text=text,
            token_ids=tuple(row.new_token_ids),
            finish_reason=row.finish_reason if error is None else "error",
            stop_reason=row.stop_reason if error is None else None,
            seed=row.params.seed,
            logprobs=None if row.logprobs is None else tuple(row.logprobs),
            error=None if error is None else message_of(error),
            error_code=None if error is None else code_of(error),
        )

    def _text(self, row: Row) -> str:
        """As a stream would have shown it."""
        if isinstance(row.sink, TextSink):
            return row.sink.text
        if self._tokenizer is None:
            return ""
        sink = self._tokenizer.sink()
        token_ids = row.new_token_ids
        if row.ended_by_id and not row.params.include_stop:
            token_ids = token_ids[:-1]
        for token_id in token_ids:
            sink.push(token_id)
        sink.finish()
        return sink.text

    def _encode(self, texts: list[str], max_tokens: int | None) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer is None:
            told = "this model has no tokenizer; give token ids instead of text"
            raise OptionError(told, "text")
        return self._tokenizer.encode(texts, max_tokens)
