"""What the engine refuses is told with the names of the protocol, not the library's."""

from __future__ import annotations

from typing import Any

import pytest

import fastgen
from fastgen.engine.request_limits import RequestLimits
from fastgen.server.limits import ServerLimits
from json_client import assert_names_of_the_protocol, refusal
from server_harness import MODEL, serving

MANY = ServerLimits(completion_logprobs=5000)  # the engine's own bounds are reached


def body(**options: Any) -> dict[str, Any]:
    return {"prompt": "And", "max_tokens": 3, "temperature": 0, **options}


@pytest.mark.parametrize(
    ("options", "bounds", "param", "told"),
    [
        ({"logprobs": 6, "echo": True}, RequestLimits.for_serving(), "logprobs", "limit of 5"),
        ({"logprobs": 21}, RequestLimits.for_serving(), "logprobs", "limit of 20"),
        ({"logprobs": 4097, "echo": True}, RequestLimits(), "logprobs", "vocabulary of 4096"),
        ({"logprobs": 4097}, RequestLimits(), "logprobs", "vocabulary of 4096"),
        ({"max_tokens": 3}, RequestLimits(max_new_tokens=2), "max_tokens", "limit of 2"),
        ({"min_tokens": 4}, RequestLimits(), "min_tokens", "most new tokens, 3"),
        ({"prompt": "And it"}, RequestLimits(prompt_tokens=1), "prompt", "limit of 1"),
    ],
)
def test_a_bound_of_the_engine(
    model: fastgen.Generator,
    options: dict[str, Any],
    bounds: RequestLimits,
    param: str,
    told: str,
) -> None:
    with serving({MODEL: model}, limits=MANY, request_limits=bounds) as server:
        error = refusal(server, body(**options))
    assert error["param"] == param
    assert error["message"].startswith(param) and told in error["message"]
    assert_names_of_the_protocol(error)
