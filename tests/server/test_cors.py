"""Which web pages may call the server from a browser, and what they may read: --allow-origin."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

import fastgen
from fastgen.server.service import Keys, checked_origins
from raw_client import exchange, get, replies
from server_harness import MODEL, RunningServer, ServerProcess, serving
from waits import WITHIN

PAGE, OTHER, FOREIGN = "https://example.com", "http://localhost:3000", "https://example.org"
SHORT = {"prompt": "And", "max_tokens": 2, "temperature": 0}
KEY = {"authorization": "Bearer key"}
ALLOWS = "access-control-allow-"


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.body = response.status, response.read()
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    @property
    def cors(self) -> dict[str, str]:
        return {n: v for n, v in self.headers.items() if n.startswith("access-control-")}


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """Names of headers are written with _ for - ."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), names)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def preflight(
    port: int, origin: str, method: str = "POST", path: str = "/v1/completions"
) -> Answer:
    """What a browser asks before it sends a key. It has none to show itself."""
    return ask(
        port, "OPTIONS", path, origin=origin, access_control_request_method=method,
        access_control_request_headers="authorization,content-type,x-stainless-os",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(model: fastgen.Generator) -> Iterator[RunningServer]:
    """With a key, for pages of two origins."""
    with serving({MODEL: model}, keys=Keys(["key"]), allow_origins=[PAGE, OTHER]) as running:
        yield running


@pytest.fixture(scope="module")
def open_server(model: fastgen.Generator) -> Iterator[RunningServer]:
    with serving({MODEL: model}, allow_origins=["*"]) as running:
        yield running


@pytest.mark.parametrize("origin", [PAGE, OTHER])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models")])
def test_preflight(server: RunningServer, origin: str, method: str, path: str) -> None:
    found = preflight(server.port, origin, method, path)
    assert found.status == 200
    assert found.cors[ALLOWS + "origin"] == origin
    assert method in found.cors[ALLOWS + "methods"].split(", ")
    assert "authorization" in found.cors[ALLOWS + "headers"]
    assert "x-stainless-os" in found.cors[ALLOWS + "headers"]
    assert ALLOWS + "credentials" not in found.cors
    assert "Origin" in found.headers["vary"] and found.headers["x-request-id"]


CALLS: dict[str, tuple[str, str, Any, dict[str, str], int]] = {
    "completion": ("POST", "/v1/completions", SHORT, KEY, 200),
    "stream": ("POST", "/v1/completions", SHORT | {"stream": True}, KEY, 200),
    "models": ("GET", "/v1/models", None, KEY, 200),
    "health": ("GET", "/health", None, {}, 200),
    "no key": ("POST", "/v1/completions", SHORT, {}, 401),
    "wrong option": ("POST", "/v1/completions", SHORT | {"n": -1}, KEY, 400),
    "no JSON": ("POST", "/v1/completions", "x", KEY, 400),
    "no such model": ("POST", "/v1/completions", SHORT | {"model": "x"}, KEY, 404),
    "no such path": ("GET", "/x", None, KEY, 404),
    "no such method": ("DELETE", "/v1/models", None, KEY, 405),
    "chat": ("POST", "/v1/chat/completions", {}, KEY, 404),
    "headers too large": ("GET", "/v1/models?" + "x" * 40_000, None, KEY, 431),
}


@pytest.mark.parametrize("case", CALLS)
def test_answers_errors_and_streams_can_be_read(server: RunningServer, case: str) -> None:
    method, path, body, headers, status = CALLS[case]
    found = ask(server.port, method, path, body, origin=PAGE, **headers)
    assert (found.status, found.cors) == (
        status, {ALLOWS + "origin": PAGE, "access-control-expose-headers": "x-request-id"},
    )  # fmt: skip
    assert "Origin" in found.headers["vary"] and found.headers["x-request-id"]
    same = ask(server.port, method, path, body, **headers)
    assert (same.status, same.cors) == (status, {}), "it is no page that asks"


@pytest.mark.parametrize(
    "origin", [FOREIGN, "null", "http://example.com", PAGE + ":8443", PAGE + ".org", PAGE + "/"]
)
def test_pages_of_other_origins_read_nothing(server: RunningServer, origin: str) -> None:
    found = preflight(server.port, origin)
    assert found.status == 400 and ALLOWS + "origin" not in found.cors
    for headers in (KEY, {}):
        found = ask(server.port, "POST", "/v1/completions", SHORT, origin=origin, **headers)
        assert ALLOWS + "origin" not in found.cors


@pytest.mark.parametrize(
    ("origin", "method", "lines", "told"),
    [
        (FOREIGN, "POST", {}, "of this origin may not call this server: see --allow-origin"),
        (PAGE, "DELETE", {}, "may only use GET and POST"),
        (PAGE, "POST", {"access_control_request_private_network": "true"}, "public network"),
    ],
)
def test_a_refused_preflight_is_an_error_as_others_are(
    server: RunningServer, origin: str, method: str, lines: dict[str, str], told: str
) -> None:
    found = ask(
        server.port, "OPTIONS", "/v1/models", origin=origin, access_control_request_method=method,
        **lines,
    )  # fmt: skip
    assert found.status == 400 and found.headers["content-type"] == "application/json"
    assert found.cors.get(ALLOWS + "origin") == (PAGE if origin == PAGE else None)
    [error] = json.loads(found.body).values()
    assert told in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": None}
    assert "Origin" in found.headers["vary"] and found.headers["x-request-id"]


# What is refused before the application sees it: bytes, and how they are answered.
EARLY: dict[str, tuple[list[bytes], int]] = {
    "headers in pieces": ([b"a: " + b"b" * 20_000 + b"\r\n"] * 2, 431),
    "no chunk": ([b"transfer-encoding: chunked\r\n\r\nxyz\r\n"], 400),
}


@pytest.mark.parametrize("case", EARLY)
@pytest.mark.parametrize("after", [b"", get("/health").replace(b"connection: close\r\n", b"")])
def test_what_the_connection_refuses_can_be_read(
    server: RunningServer, open_server: RunningServer, case: str, after: bytes
) -> None:
    """On a new connection, and after a request of a page that has no origin."""
    parts, status = EARLY[case]

    def cors_of(port: int, origin: str) -> dict[str, str]:
        begin = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nOrigin:  {origin} \r\n".encode()
        *_, reply = replies(exchange(port, after + begin + parts[0], *parts[1:]))
        assert reply.status == status and reply.message
        assert "origin" in reply.headers["vary"].lower()
        return {n: v for n, v in reply.headers.items() if n.startswith(ALLOWS)}

    for origin in (PAGE, OTHER):
        assert cors_of(server.port, origin) == {ALLOWS + "origin": origin}
    assert cors_of(server.port, FOREIGN) == {}
    assert cors_of(open_server.port, FOREIGN) == {ALLOWS + "origin": "*"}


def test_what_is_no_http_has_no_origin(server: RunningServer, open_server: RunningServer) -> None:
    for running, allowed in ((server, None), (open_server, "*")):
        [reply] = replies(exchange(running.port, f"EHLO\r\norigin: {PAGE}\r\n\r\n".encode()))
        assert reply.status == 400
        assert reply.headers.get(ALLOWS + "origin") == allowed


def test_every_page_without_credentials(open_server: RunningServer) -> None:
    """A cookie's presence changes nothing: the browser would keep such an answer from the page."""
    for origin in (PAGE, "null"):
        assert preflight(open_server.port, origin).cors[ALLOWS + "origin"] == "*"
        found = ask(open_server.port, "POST", "/v1/completions", SHORT, origin=origin, cookie="a=b")
        assert (found.status, found.cors) == (
            200, {ALLOWS + "origin": "*", "access-control-expose-headers": "x-request-id"},
        )  # fmt: skip


def test_nothing_changes_without_the_option(model: fastgen.Generator) -> None:
    with serving({MODEL: model}) as plain:
        assert preflight(plain.port, PAGE).status == 405
        found = ask(plain.port, "POST", "/v1/completions", SHORT, origin=PAGE)
    assert (found.status, found.cors, "vary" in found.headers) == (200, {}, False)


@pytest.mark.parametrize(
    "origin",
    ["", "example.com", "https://", "https://Example.com", "https://example.com/", "null", "**",
     "https://example.com:443", "http://example.com:80", "https://*.example.com", "https://a b",
     "https://a.com,https://b.com", "https://user@a.com", "https://a.com:x", "https://a.com\n"],
)  # fmt: skip
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin such as https://"):
        checked_origins([PAGE, origin])


def test_what_is_one_is_taken() -> None:
    origins = ["*", PAGE, "http://127.0.0.1:8080", "http://[::1]:3000", "https://a.com:80",
               "tauri://localhost", "chrome-extension://abcdef"]  # fmt: skip
    assert checked_origins(origins) == origins


def test_the_command(model: fastgen.Generator) -> None:
    with ServerProcess("--allow-origin", PAGE, "--allow-origin", OTHER) as server:
        port = int(server.wait_until_ready().rpartition(":")[2])
        found = [preflight(port, origin).status for origin in (PAGE, OTHER, FOREIGN)]
    assert found == [200, 200, 400]
