"""What each path of the server does. All errors are exceptions; app.py makes responses of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fastgen.errors import about
from fastgen.frontends.async_engine import AsyncStream
from fastgen.frontends.engine_thread import estimate_size
from fastgen.results import Generation
from fastgen.server.bodies import read_json
from fastgen.server.calls import json_response, off_loop, salt_of, service_of
from fastgen.server.completions import (
    Answer,
    CompletionRequest,
    check_answer,
    completion_request,
    refuse_failed,
    usage_of,
)
from fastgen.server.logprobs import LogprobsWriter
from fastgen.server.service import ServedModel, Service
from fastgen.server.streaming import EventStream, merged, unless_disconnected


async def completions(request: Request) -> Any:
    service = service_of(request)
    body = await read_json(request, service.limits)
    asked = await off_loop(_size(body), lambda: completion_request(body, service.limits))
    model = service.model(asked.model)
    asked = replace(asked, model=model.name)
    check_answer(asked, model.max_seq_len, service.limits)
    salt = salt_of(request, asked.cache_salt)
    if asked.add_special_tokens:
        asked = replace(asked, prompts=await _with_special_tokens(model, asked.prompts))
    if asked.stream:
        return await _streamed(model, asked, salt)
    generations = await unless_disconnected(
        request,
        model.engine.generate(
            asked.prompts, asked.params, timeout=asked.timeout, priority=asked.priority,
            cache_salt=salt,
        ),
    )  # fmt: skip
    answer = Answer(asked, model.generator.tokenizer)
    size = sum(_answer_size(asked, generation) for generation in generations)
    return await off_loop(size, lambda: json_response(answer.whole(generations)))


async def _with_special_tokens(model: ServedModel, prompts: list[Any]) -> list[Any]:
    """Prompts as the ids that /tokenize has for them. All of them are texts, or all are ids."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return prompts
    with about("prompt"):
        return await model.engine.tokenize(texts, add_special_tokens=True)


def _answer_size(asked: CompletionRequest, generation: Generation) -> int:
    """Tokens that the answer has to list."""
    shown = asked.params.n if asked.shows_prompt_logprobs else 1
    prompts = shown if asked.needs_prompt_text else 0
    new_tokens = sum(len(completion.token_ids) for completion in generation.completions)
    return prompts * len(generation.prompt_token_ids) + new_tokens


def _size(body: dict[str, Any]) -> int:
    """Values of options that have to be checked."""
    options = (value for name, value in body.items() if name != "prompt")
    return sum(estimate_size(value) for value in options if isinstance(value, (list, dict)))


async def _streamed(model: ServedModel, asked: CompletionRequest, salt: str | None) -> EventStream:
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
    return EventStream(_events(model, asked, streams))


async def _events(
    model: ServedModel, asked: CompletionRequest, streams: Sequence[AsyncStream]
) -> AsyncIterator[dict[str, Any]]:
    answer = Answer(asked, model.generator.tokenizer)
    writers: dict[int, LogprobsWriter] = {}
    usage = {"usage": None} if asked.include_usage else {}
    try:
        async with aclosing(merged(streams)) as pieces:
            async for at, piece in pieces:
                refuse_failed(piece)
                index = at * asked.params.n + piece.index
                shown = piece.text
                if index not in writers:
                    writers[index] = LogprobsWriter(model.generator.tokenizer)
                    shown = _begin(asked, answer, streams[at], writers[index], at) + shown
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


def _begin(
    asked: CompletionRequest,
    answer: Answer,
    stream: AsyncStream,
    writer: LogprobsWriter,
    at: int,
) -> str:
    """What a choice's first event begins with: the prompt, if it is asked for. Its writer begins
    after the prompt, in any case."""
    if not asked.needs_prompt_text:
        return ""
    prompt = answer.prompt_text(asked.prompts[at])
    request = stream.request
    if asked.shows_prompt_logprobs and request is not None:
        writer.add_prompt(prompt, request.prompt_token_ids, request.prompt_logprobs or ())
    else:
        writer.skip(prompt)
    return prompt if asked.echo else ""


def _usage(streams: Sequence[AsyncStream]) -> dict[str, int]:
    requests = [stream.request for stream in streams if stream.request is not None]
    return usage_of(
        (len(request.prompt_token_ids) for request in requests),
        (len(row.new_token_ids) for request in requests for row in request.rows),
    )


async def models(request: Request) -> dict[str, Any]:
    served = service_of(request).models.values()
    return {"object": "list", "data": [_model(one) for one in served]}


async def model(request: Request) -> dict[str, Any]:
    return _model(service_of(request).model(request.path_params["name"]))


def _model(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "fastgen",
        "max_model_len": served.max_seq_len,
    }


async def live(request: Request) -> Response:
    service = service_of(request)
    return _health(503 if service.is_lost else 200, service)


async def ready(request: Request) -> Response:
    service = service_of(request)
    return _health(503 if service.troubles else 200, service)


def _health(status: int, service: Service) -> Response:
    told = "ok" if status == 200 else "unavailable"
    return JSONResponse({"status": told, "troubles": service.troubles}, status)


async def metrics(request: Request) -> Response:
    text = service_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
