"""The OpenAPI description, with the limits that this server has."""

from __future__ import annotations

from typing import Any

import fastgen
from fastgen.engine.request_limits import RequestLimits
from fastgen.server.completions import LONGEST_SALT, OTHERS, SAMPLING
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
            {"model": _model(names), "prompt": {"type": "string"}}, ["prompt"])),
        "/detokenize": _post("The text of token ids", _object(
            {"model": _model(names), "tokens": _ids()}, ["tokens"])),
        "/v1/models": _get("The models"),
        "/v1/models/{name}": _get("One of them", "name"),
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
    stop = {"type": "string", "maxLength": limits.stop_bytes}
    penalty = limits.penalty
    biases = {
        "type": "object",
        "maxProperties": limits.logit_bias,
        "additionalProperties": _number(_minus(limits.logit_bias_value), limits.logit_bias_value),
    }
    known: Schema = {
        "model": _model(names),
        "prompt": {"oneOf": text_or_ids},
        "max_tokens": _integer(0, limits.max_new_tokens)
        | {"default": 16, "description": f"never past the context of {context} tokens"},
        "min_tokens": _integer(0),
        "n": _integer(1, limits.n),
        "best_of": _integer(1, limits.best_of),
        "stream": {"type": "boolean"},
        "stream_options": _object(
            {name: {"type": "boolean"} for name in ("include_usage", "include_obfuscation")}
        ),
        "logprobs": _integer(0, service.limits.completion_logprobs),
        "echo": {"type": "boolean"},
        "suffix": {"const": "", "description": "text cannot be inserted"},
        "user": {"type": "string"},
        "timeout": _above_zero(service.limits.request_timeout),
        "priority": _integer(0, 1000) | {"description": "lower is sooner"},
        "cache_salt": _salt(),
        "return_token_ids": {"type": "boolean"},
        "stop": {"oneOf": [stop, _array(stop, limits.stop)]},
        "seed": _integer(0, 2**64 - 1),
        "temperature": _number(0, limits.temperature),
        "top_p": _above_zero(1),
        "presence_penalty": _number(_minus(penalty), penalty),
        "frequency_penalty": _number(_minus(penalty), penalty),
        "logit_bias": biases,
        "sequence_bias": biases,
        "stop_token_ids": _array(_integer(0), limits.stop_token_ids),
        "bad_words": _array({}, limits.bad_words),
        "allowed_token_ids": _array(_integer(0), limits.allowed_token_ids),
        "suppress_tokens": _array(_integer(0), limits.suppress_tokens),
        "begin_suppress_tokens": _array(_integer(0), limits.suppress_tokens),
        "top_k": _integer(0),
        "min_p": _number(0, 1),
        "top_h": _above_zero(1),
        "typical_p": _above_zero(1),
        "epsilon_cutoff": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "eta_cutoff": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
        "no_repeat_ngram_size": _integer(0),
        "exponential_decay_length_penalty": {
            "type": "array", "prefixItems": [_integer(0), _number(None, None)],
            "minItems": 2, "maxItems": 2,
        },
        "include_stop": {"type": "boolean"},
        "ignore_eos": {"type": "boolean"},
    }  # fmt: skip
    fields = {name: known[name] for name in [*OTHERS, *SAMPLING]}
    return _object(fields, ["prompt"])


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


def _get(summary: str, parameter: str | None = None) -> Schema:
    operation: Schema = {"summary": summary, "responses": _responses()}
    if parameter is not None:
        operation["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return {"get": operation}


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


def _number(low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "number"} | {name: at for name, at in bounds.items() if at is not None}


def _above_zero(high: float) -> Schema:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": high}


def _minus(bound: float | None) -> float | None:
    return None if bound is None else -bound
