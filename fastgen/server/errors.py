"""Errors as OpenAI's clients understand them: what happened, and nothing of the inside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastgen.errors import EngineError, NothingToDrawError, QueueFull

# What fastgen calls it, and what callers of this protocol do.
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
PLAIN_NAMES = {"n", "prompt", "stop", "seed", "temperature", "logprobs", "echo", "model", "stream",
               "user", "suffix", "timeout", "priority", "input", "labels", "tokens"}  # fmt: skip
_LONGEST_MESSAGE = 1000  # a message may quote what it was sent
_UNKNOWN = re.compile(r"unknown option '([^']+)'")
_ABOUT = re.compile(r"(?:prompt \d+: )?(?:[a-z ]+ in |the |a )?([a-z_]+)\b")
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
        message = self.message
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "..."
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
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
        message = _renamed(str(error))
        return ApiError(400, message, param_of(message))
    return ApiError(500, "the server failed; its log has the reason", code="internal_error")


def _engine_error(message: str) -> ApiError:
    """A step that failed may quote what is inside: it is named, and the log has the rest."""
    if message.startswith(("this engine", "this model")):
        return ApiError(503, message.split(":")[0], code="unavailable")
    if message.startswith("cancelled: "):  # a stream that was not read
        return ApiError(408, message, code="unread")
    if message == "scoring failed: timeout":
        return ApiError(408, message, code="timeout")
    if message == "scoring failed: cancelled":
        return unavailable()
    return ApiError(500, "generation failed: a step of the engine did", code="step_failed")


def unavailable() -> ApiError:
    """For what was under way when the server came to its end."""
    return ApiError(503, "cancelled: the server is shutting down", code="unavailable")


def row_failed(message: str) -> ApiError:
    """What a caller is told of a completion whose error this is: what it quotes is not theirs."""
    told = "generation failed; the server's log has the reason"
    if message == str(NothingToDrawError()):
        told = f"generation failed: {message}"
    return ApiError(500, told, code="generation_failed")


def _renamed(message: str) -> str:
    """With this protocol's names of options; not where it quotes what it was sent."""
    for ours, theirs in NAMES.items():
        message = re.sub(rf"(?<!')\b{ours}\b", theirs, message)
    return message


def param_of(message: str) -> str | None:
    """The option that a message begins with, or names as unknown."""
    if unknown := _UNKNOWN.match(message):
        return unknown[1]
    found = _ABOUT.match(message)
    name = found[1] if found else ""
    return name if "_" in name or name in PLAIN_NAMES else None
