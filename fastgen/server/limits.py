"""ServerLimits: bounds of connections, bodies and answers; RequestLimits bounds one request."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastgen.checks import integer, real


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Bounds of connections and bodies. Sizes are in bytes, times in seconds.

    Attributes:
        body_bytes, header_bytes: of a request; more is refused with 413 and 431.
        json_depth: how deep lists and objects of a body may be nested.
        prompts: of one request.
        completion_logprobs: most likely tokens of each, in completions.
        score_tokens: of all texts of one request, each with the prompt before it.
        answer_logprobs: log-probabilities that a completion's answer may hold.
        header_timeout: for the headers of a request to arrive, once its connection is open.
        keep_alive: how long a connection without a request stays open.
        body_timeout: for the body to arrive.
        send_timeout: for a client to take what it is sent.
        request_timeout: for everything that one request generates.
        drain_timeout: for requests under way to end after SIGTERM; then they are cancelled.
    """

    body_bytes: int = 4 << 20
    header_bytes: int = 32 << 10
    json_depth: int = 32
    prompts: int = 128
    completion_logprobs: int = 5
    score_tokens: int = 65_536
    answer_logprobs: int = 400_000
    header_timeout: float = 10.0
    keep_alive: float = 15.0
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    request_timeout: float = 600.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float):
                real(field.name, value, 0, float("inf"), above=field.name != "drain_timeout")
            else:
                integer(field.name, value, 1)
