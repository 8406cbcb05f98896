"""Errors as OpenAI's clients understand them: what happened, and nothing of the inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgen.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    NothingToDrawError,
    OptionError,
    OptionTypeError,
    QueueFull,
    RequestCancelledError,
    RequestTimeoutError,
    RowFailedError,
    SlowReaderError,
    StepFailedError,
    message_of,
)
from fastgen.sampling.options import OPTIONS

# What fastgen calls it, and what callers of this protocol do.
NAMES = {option.name: option.server_name for option in OPTIONS if option.server_name}
NAMES["prompt_logprobs"] = "logprobs"  # with `echo` it is of the prompt, too
_LONGEST_MESSAGE = 1000  # a message may quote what it was sent

# Status and code of every error, and its type, which OpenAI's clients know.
TYPES: dict[tuple[int, str | None], str] = {
    (400, None): "invalid_request_error",
    (400, "model_not_found"): "invalid_request_error",
    (401, "invalid_api_key"): "authentication_error",
    (404, "model_not_found"): "not_found_error",
    (404, "unknown_url"): "not_found_error",
    (405, "unknown_url"): "invalid_request_error",
    (408, None): "timeout_error",
    (408, "timeout"): "timeout_error",
    (408, "unread"): "timeout_error",
    (413, None): "invalid_request_error",
    (429, "queue_full"): "rate_limit_error",
    (431, None): "invalid_request_error",
    (500, "generation_failed"): "server_error",
    (500, "internal_error"): "server_error",
    (500, "step_failed"): "server_error",
    (503, "unavailable"): "server_error",
}


@dataclass
class ApiError(Exception):
    """A response that says what is wrong. `param` is the field that is, if it is one.

    `status` and `code` stand in TYPES.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        assert (self.status, self.code) in TYPES, (self.status, self.code)

    @property
    def kind(self) -> str:
        return TYPES[self.status, self.code]

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


class _Answer(NamedTuple):
    """`told` stands for the error's own message where that may quote what is inside."""

    status: int
    code: str
    told: str | None = None


# The first class that an error is one of.
ANSWERS: dict[type[EngineError], _Answer] = {
    QueueFull: _Answer(429, "queue_full"),
    EngineClosedError: _Answer(503, "unavailable"),
    EngineDeadError: _Answer(503, "unavailable", "this engine cannot go on"),
    RequestCancelledError: _Answer(503, "unavailable", "cancelled: the server is shutting down"),
    RequestTimeoutError: _Answer(408, "timeout"),
    SlowReaderError: _Answer(408, "unread"),
    NothingToDrawError: _Answer(
        500, "generation_failed", f"generation failed: {NothingToDrawError()}"
    ),
    RowFailedError: _Answer(
        500, "generation_failed", "generation failed; the server's log has the reason"
    ),
    StepFailedError: _Answer(500, "step_failed", "generation failed: a step of the engine did"),
    EngineError: _Answer(500, "internal_error", "the server failed; its log has the reason"),
}


def api_error(error: BaseException) -> ApiError:
    """What a caller is told of an exception; only errors made for callers are quoted."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (OptionError, OptionTypeError)):
        return _wrong_option(error)
    kind = next((kind for kind in ANSWERS if isinstance(error, kind)), EngineError)
    return _answered(kind, message_of(error))


def completion_error(code: str | None, message: str) -> ApiError:
    """What a caller is told of a completion that ended with an error of this code."""
    known = (NothingToDrawError, StepFailedError)
    kind = next((kind for kind in known if kind.code == code), RowFailedError)
    return _answered(kind, message)


def _answered(kind: type[EngineError], message: str) -> ApiError:
    answer = ANSWERS[kind]
    told = message if answer.told is None else answer.told
    return ApiError(answer.status, told, code=answer.code)


def _wrong_option(error: OptionError | OptionTypeError) -> ApiError:
    """With this protocol's name of the option. A name that it has not may be anything."""
    option = error.option
    if option is None or not option.isprintable():
        return ApiError(400, str(error))
    param = NAMES.get(option, option)
    told = str(error) if param == option else f"{param}: {error.problem}"
    return ApiError(400, told, param or None)


def unavailable() -> ApiError:
    """For what was under way when the server came to its end."""
    return api_error(RequestCancelledError())
