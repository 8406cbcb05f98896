"""What each path of the server does. All errors are exceptions; app.py makes responses of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastgen.async_engine import AsyncStream
from fastgen.checks import integer
from fastgen.engine_thread import sized
from fastgen.results import Score
from fastgen.server.bodies import read_json
from fastgen.server.completions import (
    Answer,
    CompletionRequest,
    check_names,
    completion_request,
    refuse_failed,
    text,
    timeout_of,
    usage_of,
)
from fastgen.server.errors import ApiError
from fastgen.server.logprobs import LogprobsWriter
from fastgen.server.service import ServedModel, Service
from fastgen.server.streaming import EventStream, as_json, merged, unless_disconnected

T = TypeVar("T")
_QUICK_SIZE = 1024  # options' values, or tokens of an answer: some milliseconds


async def completions(request: Request) -> Any:
    service = _service(request)
    body = await read_json(request, service.limits)
    asked = await _off_loop(_size(body), lambda: completion_request(body, service.limits))
    model = service.model(asked.model)
    asked = replace(asked, model=model.name)
    salt = _salt(request, asked.cache_salt)
    if asked.stream:
        return await _streamed(service, model, asked, salt)
    generations = await unless_disconnected(
        request,
        model.engine.generate(
            asked.prompts, asked.params, timeout=asked.timeout, priority=asked.priority,
            cache_salt=salt,
        ),
    )  # fmt: skip
    size = 0
    for generation in generations:
        new_tokens = [len(completion.token_ids) for completion in generation.completions]
        prompt_tokens = len(generation.prompt_token_ids)
        service.metrics.ended(model.name, generation.timings, prompt_tokens, new_tokens)
        size += prompt_tokens * asked.shows_prompt_logprobs * asked.params.n + sum(new_tokens)
    answer = Answer(asked, model.generator.tokenizer)
    return await _off_loop(size, lambda: _json(answer.whole(generations)))


def _json(value: dict[str, Any]) -> Response:
    return Response(as_json(value), media_type="application/json")


def _size(body: dict[str, Any]) -> int:
    """Values of options that have to be looked at."""
    options = (value for name, value in body.items() if name != "prompt")
    return sum(sized(value) for value in options if isinstance(value, (list, dict)))


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """Do it at once if it is quick, else on another thread, so that nobody waits for it."""
    if size <= _QUICK_SIZE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _streamed(
    service: Service, model: ServedModel, asked: CompletionRequest, salt: str | None
) -> EventStream:
    """All prompts' streams have begun, or none."""
    model.engine.thread.check_size(len(asked.prompts) * asked.params.num_rows)
    streams = [
        model.engine.stream(
            prompt, asked.params, timeout=asked.timeout, priority=asked.priority, cache_salt=salt
        )
        for prompt in asked.prompts
    ]
    try:
        for stream in streams:
            await stream.open()
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    return EventStream(_events(service, model, asked, streams))


async def _events(
    service: Service, model: ServedModel, asked: CompletionRequest, streams: Sequence[AsyncStream]
) -> AsyncIterator[dict[str, Any]]:
    answer = Answer(asked, model.generator.tokenizer)
    writers: dict[int, LogprobsWriter] = {}
    usage = {"usage": None} if asked.include_usage else {}
    try:
        async with aclosing(merged(streams)) as pieces:
            async for at, piece in pieces:
                refuse_failed(piece.finish_reason, piece.error)
                index = at * asked.params.n + piece.index
                shown = piece.text
                if index not in writers:
                    writers[index] = LogprobsWriter(model.generator.tokenizer)
                    shown = _echo(asked, answer, streams[at], writers[index], at) + shown
                if piece.logprobs is not None:
                    writers[index].add(piece.logprobs)
                choice = {
                    "index": index,
                    "text": shown,
                    "logprobs": None if asked.params.logprobs is None else writers[index].take(),
                    "finish_reason": piece.finish_reason,
                }
                if piece.finish_reason is not None:
                    choice["stop_reason"] = piece.stop_reason
                if asked.return_token_ids:
                    choice["token_ids"] = list(piece.token_ids)
                yield answer.object([choice]) | usage
        if asked.include_usage:
            yield answer.object([]) | {"usage": _usage(streams)}
    finally:
        for stream in streams:
            await stream.aclose()
            _count(service, model, stream)


def _echo(
    asked: CompletionRequest,
    answer: Answer,
    stream: AsyncStream,
    writer: LogprobsWriter,
    at: int,
) -> str:
    """What a choice's first event begins with: the prompt, if it is asked for."""
    if not asked.echo:
        return ""
    prompt = answer.prompt_text(asked.prompts[at])
    request = stream.request
    if asked.shows_prompt_logprobs and request is not None:
        writer.add_prompt(prompt, request.prompt_token_ids, request.prompt_logprobs or ())
    else:
        writer.skip(prompt)
    return prompt


def _usage(streams: Sequence[AsyncStream]) -> dict[str, int]:
    requests = [stream.request for stream in streams if stream.request is not None]
    return usage_of(
        (len(request.prompt_token_ids) for request in requests),
        (len(row.new_token_ids) for request in requests for row in request.rows),
    )


def _count(service: Service, model: ServedModel, stream: AsyncStream) -> None:
    request = stream.request
    if request is not None and request.done:
        new_tokens = [len(row.new_token_ids) for row in request.rows]
        service.metrics.ended(
            model.name, request.timings, len(request.prompt_token_ids), new_tokens
        )


async def score(request: Request) -> dict[str, Any]:
    """Log-probabilities of texts, or of labels behind a prompt."""
    service = _service(request)
    body = await read_json(request, service.limits)
    given = {name: value for name, value in body.items() if value is not None}
    check_names(given, ["model", "input", "prompt", "labels", "timeout", "cache_salt"])
    model = service.model(text("model", given.get("model", "")))
    if ("input" in given) == ("labels" in given) or ("prompt" in given) != ("labels" in given):
        raise ApiError(400, "give input, or prompt with labels", "input")
    labels = _texts("labels", given["labels"], service) if "labels" in given else []
    texts = [given["prompt"], *labels] if labels else _texts("input", given["input"], service)
    ids = await model.engine.tokenize(texts)
    first = 0
    if labels:
        first = len(ids[0])
        ids = [ids[0] + label for label in ids[1:]]
    num_tokens = sum(map(len, ids))
    if num_tokens > service.limits.score_tokens:
        most = service.limits.score_tokens
        raise ApiError(400, f"input: {num_tokens} tokens exceed the limit of {most}", "input")
    salt = _salt(request, given.get("cache_salt"))
    timeout = timeout_of(given, service.limits)
    scores = await unless_disconnected(
        request, model.engine.score(ids, timeout=timeout, cache_salt=salt)
    )
    data = [_score(model, at, score, first) for at, score in enumerate(scores)]
    answer: dict[str, Any] = {"object": "list", "model": model.name, "data": data}
    if labels:
        for item, label in zip(data, labels, strict=True):
            item["label"] = label
        totals = [item["total_logprob"] for item in data]
        answer["best"] = totals.index(max(totals))
    return answer | {"usage": usage_of([num_tokens], [])}


def _score(model: ServedModel, index: int, score: Score, first: int) -> dict[str, Any]:
    """What stands from the token `first` on."""
    tokenizer = model.generator.tokenizer
    token_ids, logprobs = score.token_ids[first:], score.logprobs[first:]
    scored = [logprob for logprob in logprobs if logprob is not None]
    total = math.fsum(scored)
    return {
        "object": "score",
        "index": index,
        "tokens": [tokenizer.token_text(token_id) for token_id in token_ids] if tokenizer else [],
        "token_ids": list(token_ids),
        "logprobs": list(logprobs),
        "total_logprob": total,
        "perplexity": math.exp(min(700.0, -total / len(scored))) if scored else None,
        "windows": score.windows,
    }


def _texts(name: str, value: Any, service: Service) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise TypeError(f"{name} must be a string or a list of strings")
    if len(texts) > service.limits.prompts:
        most = service.limits.prompts
        raise ApiError(400, f"{name}: {len(texts)} exceed the limit of {most}", name)
    return [text(name, one) for one in texts]


async def models(request: Request) -> dict[str, Any]:
    served = _service(request).models.values()
    return {"object": "list", "data": [_model(one) for one in served]}


async def model(request: Request) -> dict[str, Any]:
    return _model(_service(request).model(request.path_params["name"]))


def _model(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "fastgen",
        "max_model_len": served.max_seq_len,
    }


async def tokenize(request: Request) -> dict[str, Any]:
    service = _service(request)
    body = await read_json(request, service.limits)
    check_names(body, ["model", "prompt"])
    served = service.model(text("model", body.get("model") or ""))
    [ids] = await served.engine.tokenize([text("prompt", body.get("prompt"))])
    return {"tokens": ids, "count": len(ids), "max_model_len": served.max_seq_len}


async def detokenize(request: Request) -> dict[str, Any]:
    service = _service(request)
    body = await read_json(request, service.limits)
    check_names(body, ["model", "tokens"])
    served = service.model(text("model", body.get("model") or ""))
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise TypeError(f"tokens must be a list of token ids, not {type(tokens).__name__}")
    most = served.generator.config.vocab_size - 1
    await _off_loop(len(tokens), lambda: [integer("tokens", one, 0, most) for one in tokens])
    return {"prompt": await served.engine.detokenize(tokens)}


async def live(request: Request) -> Response:
    service = _service(request)
    return _health(503 if service.is_lost else 200, service)


async def ready(request: Request) -> Response:
    service = _service(request)
    return _health(503 if service.troubles else 200, service)


def _health(status: int, service: Service) -> Response:
    told = "ok" if status == 200 else "unavailable"
    return JSONResponse({"status": told, "troubles": service.troubles}, status)


async def metrics(request: Request) -> Response:
    text = _service(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _salt(request: Request, own: Any) -> str | None:
    """Prompts of different keys, and of different salts of one key, share nothing."""
    key_salt: str | None = request.scope["state"]["salt"]
    parts = [part for part in (key_salt, own) if part is not None]
    return ":".join(text("cache_salt", part) for part in parts) if parts else None
