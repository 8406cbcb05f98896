"""Errors as OpenAI's clients understand them: what happened, and nothing of the inside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastgen.errors import EngineError, QueueFull

# What fastgen calls it, and what callers of this protocol do.
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


@dataclass
class ApiError(Exception):
    """A response that says what is wrong. `param` is the field that is, if it is one."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @property
    def kind(self) -> str:
        return _KINDS.get(self.status, "server_error")

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # what is left of the body is not read
            headers["connection"] = "close"
        return headers

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def api_error(error: BaseException) -> ApiError:
    """What a caller is told of an exception; only errors made for callers are quoted."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, EngineError):
        return _engine_error(str(error))
    if isinstance(error, (TypeError, ValueError)):
        message = str(error)
        for ours, theirs in NAMES.items():
            message = message.replace(ours, theirs)
        return ApiError(400, message, param_of(message))
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


def _engine_error(message: str) -> ApiError:
    """A step that failed may quote what is inside: it is named, and the log has the rest."""
    if message.startswith("this engine") or message.startswith("this model"):
        return ApiError(503, message.split(":")[0], code="unavailable")
    if message.startswith("generation failed"):
        return ApiError(500, "generation failed: a step of the engine did", code="step_failed")
    return ApiError(500, message, code="engine_error")


def param_of(message: str) -> str | None:
    """The option that a message begins with or names as unknown."""
    found = re.match(r"(?:prompt \d+: )?(?:unknown option ')?([a-z][a-z_]+)'?\b", message)
    name = found[1] if found else ""
    return name if "_" in name or name in PLAIN_NAMES else None


PLAIN_NAMES = {"n", "prompt", "stop", "seed", "temperature", "logprobs", "echo", "model", "stream"}
