"""/tokenize, /detokenize and /tokenizer_info: text and token ids, without generating anything."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgen.checks import boolean, integer
from fastgen.errors import OptionTypeError, about
from fastgen.server.bodies import read_json
from fastgen.server.calls import json_response, off_loop, service_of
from fastgen.server.completions import check_names, text, without_nulls
from fastgen.server.errors import ApiError


async def tokenize(request: Request) -> Response:
    """The ids that a prompt of this text has."""
    service = service_of(request)
    given = without_nulls(await read_json(request, service.limits))
    check_names(given, ["model", "prompt", "add_special_tokens"])
    served = service.model(text("model", given.get("model", "")))
    if boolean("add_special_tokens", given.get("add_special_tokens", False)):
        told = "add_special_tokens: prompts get none here; write those that you want into the text"
        raise ApiError(400, told, "add_special_tokens")
    with about("prompt"):
        [ids] = await served.engine.tokenize([text("prompt", given.get("prompt"))])
    answer = {"tokens": ids, "count": len(ids), "max_model_len": served.max_seq_len}
    return await off_loop(len(ids), lambda: json_response(answer))


async def detokenize(request: Request) -> dict[str, Any]:
    """The text of ids, special tokens written out."""
    service = service_of(request)
    given = without_nulls(await read_json(request, service.limits))
    check_names(given, ["model", "tokens"])
    served = service.model(text("model", given.get("model", "")))
    tokens = given.get("tokens")
    if not isinstance(tokens, list):
        told = f"tokens must be a list of token ids, not {type(tokens).__name__}"
        raise OptionTypeError(told, "tokens")
    most = served.generator.config.vocab_size - 1
    await off_loop(len(tokens), lambda: [integer("tokens", one, 0, most) for one in tokens])
    with about("tokens"):
        return {"prompt": await served.engine.detokenize(tokens, skip_special_tokens=False)}


async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The tokens with which the model's texts begin, end and are padded, as texts."""
    served = service_of(request).model(request.query_params.get("model", ""))
    tokenizer, config = served.generator.tokenizer, served.generator.config
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer", "model")

    def shown(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token_text(token_id)

    return {
        "bos_token": shown(config.bos_token_id),
        "eos_token": shown(next(iter(config.eos_token_ids), None)),
        "pad_token": shown(config.pad_token_id),
        "chat_template": None,  # this server continues text
    }
