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
from fastgen.text.special_tokens import ROLES


async def tokenize(request: Request) -> Response:
    """The ids that a prompt of this text has; special tokens are added if that is asked for."""
    service = service_of(request)
    given = without_nulls(await read_json(request, service.limits))
    check_names(given, ["model", "prompt", "add_special_tokens"])
    served = service.model(text("model", given.get("model", "")))
    adds = boolean("add_special_tokens", given.get("add_special_tokens", False))
    with about("prompt"):
        texts = [text("prompt", given.get("prompt"))]
        [ids] = await served.engine.tokenize(texts, add_special_tokens=adds)
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
    """What the tokenizer's files say: the tokens that have a role, as texts, and the template for
    chats, which the caller has to apply: this server continues text."""
    served = service_of(request).model(request.query_params.get("model", ""))
    tokenizer = served.generator.tokenizer
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer", "model")
    roles: dict[str, Any] = {role: tokenizer.roles.get(role) for role in ROLES}
    return roles | {"chat_template": tokenizer.chat_template}
