"""/v1/score: log-probabilities of texts, or of labels after a prompt."""

from __future__ import annotations

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgen.errors import OptionTypeError, about
from fastgen.results import Score
from fastgen.server.bodies import read_json
from fastgen.server.calls import json_response, off_loop, salt_of, service_of
from fastgen.server.completions import check_names, text, timeout_of, usage_of, without_nulls
from fastgen.server.errors import ApiError
from fastgen.server.limits import ServerLimits
from fastgen.server.logprobs import shown_token
from fastgen.server.service import ServedModel
from fastgen.server.streaming import unless_disconnected


async def score(request: Request) -> Response:
    service = service_of(request)
    body = await read_json(request, service.limits)
    given = without_nulls(body)
    check_names(given, ["model", "input", "prompt", "labels", "timeout", "cache_salt"])
    model = service.model(text("model", given.get("model", "")))
    if ("input" in given) == ("labels" in given) or ("prompt" in given) != ("labels" in given):
        raise ApiError(400, "give input, or prompt with labels", "input")
    name = "labels" if "labels" in given else "input"
    texts = _texts(name, given[name], service.limits)
    if name == "labels" and "" in texts:
        raise ApiError(400, "labels holds an empty text, which has no probability", "labels")
    start: list[int] = []
    if name == "labels":
        with about("prompt"):
            [start] = await model.engine.tokenize([text("prompt", given["prompt"])])
            start = start or model.generator.job_maker.start()
    with about(name):
        ids = await model.engine.tokenize(texts)
    num_tokens = len(ids) * len(start) + sum(map(len, ids))
    if num_tokens > service.limits.score_tokens:
        told = f"{num_tokens} tokens exceed the limit of {service.limits.score_tokens}"
        raise ApiError(400, f"{name}: {told}", name)
    scores = await unless_disconnected(
        request,
        model.engine.score(
            [start + own for own in ids],
            timeout=timeout_of(given, service.limits),
            cache_salt=salt_of(request, given.get("cache_salt")),
        ),
    )

    def answer() -> dict[str, Any]:
        data = [_item(model, at, one, len(start)) for at, one in enumerate(scores)]
        best: dict[str, Any] = {}
        if name == "labels":
            for item, label in zip(data, texts, strict=True):
                item["label"] = label
            totals = [item["total_logprob"] for item in data]
            best = {"best": totals.index(max(totals))}
        told = {"object": "list", "model": model.name, "data": data, **best}
        return told | {"usage": usage_of([num_tokens], [])}

    return await off_loop(num_tokens, lambda: json_response(answer()))


def _item(model: ServedModel, index: int, score: Score, first: int) -> dict[str, Any]:
    """What stands from the token `first` on."""
    tokenizer = model.generator.tokenizer
    token_ids, logprobs = score.token_ids[first:], score.logprobs[first:]
    scored = [logprob for logprob in logprobs if logprob is not None]
    total = math.fsum(scored)
    return {
        "object": "score",
        "index": index,
        "tokens": [shown_token(tokenizer, token_id) for token_id in token_ids] if tokenizer else [],
        "token_ids": list(token_ids),
        "logprobs": list(logprobs),
        "total_logprob": total,
        "perplexity": math.exp(min(700.0, -total / len(scored))) if scored else None,
        "windows": score.windows,
    }


def _texts(name: str, value: Any, limits: ServerLimits) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise OptionTypeError(f"{name} must be a string or a list of strings", name)
    if len(texts) > limits.prompts:
        raise ApiError(400, f"{name}: {len(texts)} exceed the limit of {limits.prompts}", name)
    return [text(name, one) for one in texts]
