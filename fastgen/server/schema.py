"""The OpenAPI description, with the limits that this server has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fastgen
from fastgen.engine.request_limits import RequestLimits
from fastgen.sampling.options import Limit
from fastgen.server.completions import (
    DEFAULT_MAX_TOKENS,
    LONGEST_SALT,
    OTHERS,
    SAMPLING,
    STREAM_OPTIONS,
)
from fastgen.server.openai_values import TRANSLATIONS
from fastgen.server.service import Service

Schema = dict[str, Any]


def schema_of(service: Service) -> Schema:
    names = list(service.models)
    limits = service.models[names[0]].generator.engine.limits
    completion = _completion(service, limits, names)
    paths = {
        "/v1/completions": _post("Continue prompts", completion),
        "/v1/score": _post("Log-probabilities of texts, or of labels after a prompt",
                           _score(service, names)),
        "/tokenize": _post("Token ids of a text", _object(
            {"model": _model(names), "prompt": {"type": "string"},
             "add_special_tokens": {"type": "boolean"}}, ["prompt"])),
        "/detokenize": _post("The text of token ids, special tokens written out", _object(
            {"model": _model(names), "tokens": _ids()}, ["tokens"])),
        "/tokenizer_info": _get("Special tokens by role, and the template for chats",
                                _in_query("model")),
        "/v1/models": _get("The models"),
        "/v1/models/{name}": _get("One of them", _in_path("name")),
        "/health": _open("Whether requests are taken and steps make progress"),
        "/health/live": _open("Whether the process is of use"),
        "/health/ready": _open("As /health"),
        "/metrics": _get("Prometheus' metrics"),
    }  # fmt: skip
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "fastgen", "version": fastgen.__version__},
        "paths": paths,
    }
    if service.keys.needed:
        scheme = {"key": {"type": "http", "scheme": "bearer"}}
        document |= {"components": {"securitySchemes": scheme}, "security": [{"key": []}]}
    return document


def _completion(service: Service, limits: RequestLimits, names: list[str]) -> Schema:
    context = max(model.max_seq_len for model in service.models.values())
    text_or_ids = [
        {"type": "string"},
        _array({"type": "string"}, service.limits.prompts),
        _ids(),
        _array(_ids(), service.limits.prompts),
    ]
    own: Schema = {
        "model": _model(names),
        "prompt": {"oneOf": text_or_ids, "description": "without it a new document begins"},
        "stream": {"type": "boolean"},
        "stream_options": _object(
            {name: _nullable({"type": "boolean"}) for name in STREAM_OPTIONS}
        ),
        "logprobs": _integer(0, service.limits.completion_logprobs),
        "echo": {"type": "boolean"},
        "suffix": {"const": "", "description": "text cannot be inserted"},
        "user": {"type": "string"},
        "timeout": _above_zero(service.limits.request_timeout),
        "priority": _integer(0, 1000) | {"description": "lower is sooner"},
        "cache_salt": _salt(),
        "return_token_ids": {"type": "boolean"},
        "add_special_tokens": {"type": "boolean"},
    }
    sampling = {name: _resolved(option.schema, limits) for name, option in SAMPLING.items()}
    told = f"never past the context of {context} tokens"
    sampling["max_tokens"] |= {"default": DEFAULT_MAX_TOKENS, "description": told}
    for name, translation in TRANSLATIONS.items():
        sampling[name].pop("exclusiveMinimum", None)
        sampling[name] |= {"minimum": translation.minimum}
    fields = {name: own[name] for name in OTHERS} | sampling
    return _object({name: _nullable(field) for name, field in fields.items()})


def _resolved(schema: Any, limits: RequestLimits) -> Any:
    """A schema of the table of options, with this server's numbers; without those it has not."""
    if isinstance(schema, Limit):
        bound = getattr(limits, schema.name)
        return -bound if schema.negative and bound is not None else bound
    if isinstance(schema, Mapping):
        found = {name: _resolved(value, limits) for name, value in schema.items()}
        return {name: value for name, value in found.items() if value is not None}
    if isinstance(schema, (list, tuple)):
        return [_resolved(value, limits) for value in schema]
    return schema


def _score(service: Service, names: list[str]) -> Schema:
    most = service.limits.prompts
    texts = {"oneOf": [{"type": "string"}, _array({"type": "string"}, most)]}
    fields = {"model": _model(names), "input": texts, "prompt": {"type": "string"},
              "labels": _array({"type": "string"}, most), "cache_salt": _salt(),
              "timeout": _above_zero(service.limits.request_timeout)}  # fmt: skip
    return _object(fields)


def _post(summary: str, body: Schema) -> Schema:
    content = {"application/json": {"schema": body}}
    return {"post": {"summary": summary, "requestBody": {"required": True, "content": content},
                     "responses": _responses()}}  # fmt: skip


def _get(summary: str, *parameters: Schema) -> Schema:
    operation: Schema = {"summary": summary, "responses": _responses()}
    return {"get": operation | ({"parameters": list(parameters)} if parameters else {})}


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(name: str) -> Schema:
    return {"name": name, "in": "query", "schema": {"type": "string"}}


def _open(summary: str) -> Schema:
    """For a path that needs no key."""
    operation = _get(summary)
    operation["get"]["security"] = []
    return operation


def _responses() -> Schema:
    error = _object({name: {} for name in ("message", "type", "param", "code")})
    content = {"application/json": {"schema": _object({"error": error})}}
    return {"200": {"description": "what was asked for"},
            "default": {"description": "what is wrong", "content": content}}  # fmt: skip


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _nullable(schema: Schema) -> Schema:
    """The same, or null, which is as good as absent."""
    if "oneOf" in schema:
        return schema | {"oneOf": [*schema["oneOf"], {"type": "null"}]}
    if "const" in schema:
        rest = {name: value for name, value in schema.items() if name != "const"}
        return rest | {"enum": [schema["const"], None]}
    allowed = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return schema | {"type": [schema["type"], "null"]} | allowed


def _model(names: list[str]) -> Schema:
    return {"type": "string", "enum": names}


def _salt() -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": LONGEST_SALT}


def _ids() -> Schema:
    return _array(_integer(0))


def _array(items: Schema, most: int | None = None) -> Schema:
    return {"type": "array", "items": items} | ({} if most is None else {"maxItems": most})


def _integer(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def _above_zero(high: float) -> Schema:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": high}
