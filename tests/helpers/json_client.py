"""A client that sends JSON, as most callers of a server do. raw_client.py is for the others."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from typing import Any

from fastgen.server.errors import NAMES
from server_harness import RunningServer
from waits import WITHIN


def opened(server: RunningServer, path: str, body: Any = None) -> Any:
    """The response, to be read and closed; a POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(server.url + path, data), timeout=WITHIN)


def call(server: RunningServer, path: str, body: Any = None) -> Any:
    """The object that a request which is right is answered with."""
    with opened(server, path, body) as response:
        return json.load(response)


def exchange(
    server: RunningServer, sent: Any, path: str = "/v1/completions", method: str = "POST"
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Send an object, or bytes as they are; status, object and headers come back."""
    data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WITHIN)
    try:
        connection.request(method, path, data)
        response = connection.getresponse()
        assert response.headers["content-type"] == "application/json"
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def refusal(
    server: RunningServer, sent: Any, path: str = "/v1/completions", status: int = 400
) -> dict[str, Any]:
    """The error of a request that is refused, which has OpenAI's form."""
    found, answer, _ = exchange(server, sent, path)
    assert found == status, answer
    return checked(answer)


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The error in an answer, once it is certain that it has OpenAI's form."""
    [error] = answer.values()
    assert set(answer) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["type"].endswith("_error") and 5 < len(error["message"]) < 1100
    assert_tells_nothing(error["message"])
    return error  # type: ignore[no-any-return]


def assert_names_of_the_protocol(error: dict[str, Any]) -> None:
    """What the library calls otherwise is not named so."""
    words = set(re.findall(r"\w+", error["message"]))
    assert not words & NAMES.keys(), error["message"]


def assert_tells_nothing(message: str) -> None:
    """Neither of files nor of code."""
    for word in ("Traceback", "File ", ".py", "site-packages", "object at 0x", "object has no"):
        assert word not in message
    assert not re.search(r"/(?!v1/)\w+/", message)
