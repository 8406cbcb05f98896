"""A client that writes bytes to a server's socket, and looks closely at what comes back."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgen
from engine_harness import assert_idle
from server_harness import MODEL, RunningServer
from waits import WITHIN, wait_until

Address = int | str  # a port of this machine, or the path of a Unix socket
CANARY = {"prompt": "And it came to pass", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "In the beginning", "max_tokens": 900, "temperature": 0, "ignore_eos": True,
        "speculate": False}  # a token a step: as long as it looks  # fmt: skip
INSIDE = (b"Traceback", b".py", bytes(Path(__file__).parents[2]), b"/tmp", b"/usr", b"object at 0x")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of an error, which has to have OpenAI's form and to tell nothing of the inside."""
        assert self.headers["content-type"] == "application/json"
        [error] = self.json.values()
        assert set(error) == {"message", "type", "param", "code"}
        assert not [word for word in INSIDE if word in self.body]
        message: str = error["message"]
        return message


def replies(raw: bytes, *, to_head: bool = False) -> list[Reply]:
    """Whole responses, one after another, and nothing else."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        assert status.startswith("HTTP/1.1 ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body, _, raw = raw.partition(b"0\r\n\r\n")
        else:
            size = 0 if to_head else int(headers.get("content-length", 0))
            body, raw = raw[:size], raw[size:]
            assert len(body) == size
        found.append(Reply(int(status.split()[1]), headers, body))
    return found


def connected(address: Address, receive_buffer: int = 0) -> socket.socket:
    """Small receive buffers are the system's way of not reading."""
    client = socket.socket(socket.AF_INET if isinstance(address, int) else socket.AF_UNIX)
    try:
        client.settimeout(WITHIN)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", address) if isinstance(address, int) else address)
    except BaseException:
        client.close()
        raise
    return client


def everything(client: socket.socket) -> bytes:
    """Until the server closes, however it does."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def exchange(address: Address, *parts: bytes) -> bytes:
    """What comes back for these, each sent by itself, until the server closes."""
    with connected(address) as client:
        if isinstance(address, int):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError):  # it has had enough; its answer may be there already
            for part in parts:
                client.sendall(part)
        return everything(client)


def answer(address: Address, *parts: bytes, to_head: bool = False) -> Reply:
    """The only one."""
    [reply] = replies(exchange(address, *parts), to_head=to_head)
    return reply


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *lines, "", ""]).encode("latin-1")


def get(path: str, *lines: str) -> bytes:
    return head("GET", path, "connection: close", *lines)


def post(body: Any, *lines: str, path: str = "/v1/completions", close: bool = True) -> bytes:
    """Any body, made JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    ends = ["connection: close"] if close else []
    return head("POST", path, *ends, *lines, f"content-length: {len(data)}") + data


def chunked(data: bytes, size: int, *lines: str) -> list[bytes]:
    """The request, and its body in chunks of this size."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    start = head(
        "POST", "/v1/completions", "transfer-encoding: chunked", "connection: close", *lines
    )
    return [start, *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def canary(address: Address) -> str:
    """Text of a request like any other."""
    reply = answer(address, post(CANARY))
    assert reply.status == 200, reply
    text: str = reply.json["choices"][0]["text"]
    return text


def canary_of(model: fastgen.Generator) -> str:
    """What the canary has to be."""
    [generation] = model.generate(CANARY["prompt"], max_new_tokens=12, temperature=0)
    return generation.completions[0].text


def assert_unharmed(server: RunningServer, canary_text: str) -> None:
    """A canary is exact, and nobody holds a row, a block or a connection."""
    assert canary(server.port) == canary_text
    wait_until(lambda: not server.server.server_state.connections)
    engine = server.service.models[MODEL].generator.engine
    wait_until(lambda: engine.num_unfinished == 0)
    assert_idle(engine)


def begun(address: Address, sent: bytes, receive_buffer: int = 0) -> socket.socket:
    """A client that has sent this and does not read."""
    client = connected(address, receive_buffer)
    client.sendall(sent)
    return client


def text_of(raw: bytes) -> str:
    lines = [line for line in raw.decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)


def memory() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
