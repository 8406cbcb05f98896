"""`fastgen serve` as a process: how it starts, what it refuses, and every way in which it ends."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen.cli import main
from processes import started
from raw_client import (
    CANARY,
    LONG,
    Reply,
    answer,
    begun,
    canary,
    everything,
    exchange,
    get,
    head,
    post,
    replies,
    text_of,
)
from server_harness import ServerProcess
from tiny_checkpoints import cases, write_checkpoint
from waits import wait_until

MANY = {**LONG, "n": 32, "stream": True}  # it takes long
HUNG = """
import threading
import fastgen
from fastgen.server.limits import ServerLimits
from fastgen.server.run import Address, serve
from fastgen.server.service import Service

model = fastgen.load(max_batch_size=2)
model.engine.decoder.step = lambda batch: threading.Event().wait()
serve(Service({"m": model}, limits=ServerLimits(drain_timeout=0.5)), Address(port=0))
"""


def port_of(url: str) -> int:
    host, _, port = url.removeprefix("http://").partition(":")
    assert host == "127.0.0.1"
    return int(port)


def listeners(process: int) -> list[tuple[str, str]]:
    """Kind and address, as /proc has them, of the sockets at which a process listens."""
    names = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(os.readlink(entry))
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{process}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in names and (fields[3] == "0A" or "udp" in kind):
                found.append((kind, fields[1]))
    return found


def test_it_starts_listens_at_one_address_and_ends(canary_text: str) -> None:
    with ServerProcess() as server:
        port = port_of(server.wait_until_ready())
        assert listeners(server.process.pid) == [("tcp", f"0100007F:{port:04X}")]
        assert canary(port) == canary_text
        [served] = answer(port, get("/v1/models")).json["data"]
        assert served["id"] == "fastgen-bundled"
        server.terminate()
        assert server.wait() == 0
        assert "Traceback" not in server.output


def test_a_unix_socket_left_by_a_killed_process_is_replaced(
    tmp_path: Path, canary_text: str
) -> None:
    path = str(tmp_path / "socket")
    with ServerProcess("--uds", path) as server:
        assert server.wait_until_ready() == f"unix:{path}"
        assert canary(path) == canary_text
        assert listeners(server.process.pid) == []
        with ServerProcess("--uds", path) as second:
            assert second.wait() == 1
            assert f"fastgen: [Errno 98] Address '{path}' is already in use" in second.output
        assert canary(path) == canary_text
    assert Path(path).is_socket(), "it has been killed"
    with ServerProcess("--uds", path) as server:
        server.wait_until_ready()
        assert canary(path) == canary_text
        server.terminate()
        assert server.wait() == 0
    assert not Path(path).exists()


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\n\n first-key \nsecond-key\n")
    with ServerProcess("--api-key-file", str(keys)) as server:
        port = port_of(server.wait_until_ready())
        bearers = ["first-key", "second-key", "third-key", "# ours", ""]
        found = [answer(port, post(CANARY, f"authorization: Bearer {key}")) for key in bearers]
        assert [reply.status for reply in found] == [200, 200, 401, 401, 401]
        assert answer(port, post(CANARY)).status == 401
        assert answer(port, get("/health/ready")).status == 200
        assert "-key" not in server.output


def test_several_models(tmp_path: Path) -> None:
    """Each by its name; a path may hold an equals sign behind the name's."""
    first = write_checkpoint(tmp_path / "first")
    second = write_checkpoint(tmp_path / "a=b", n_layer=2)
    options = [f"--model=one={first}", f"--model=two={second}", f"--model={first}"]
    with ServerProcess(*options, "--max-batch-size", "2") as server:
        port = port_of(server.wait_until_ready())
        listed = answer(port, get("/v1/models")).json["data"]
        assert [each["id"] for each in listed] == ["one", "two", "first"]
        for name in ("one", "two", "first"):
            asked = {"model": name, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
            found = answer(port, post(asked)).json
            assert (found["model"], found["usage"]["completion_tokens"]) == (name, 4)
        missing = answer(port, post({"model": "no", "prompt": [1]}))
        assert (missing.status, missing.message) == (
            404, "the model 'no' does not exist; this server has: one, two, first",
        )  # fmt: skip
        assert answer(port, post({"prompt": [1]})).status == 400
        assert str(tmp_path) not in str([missing, listed])


WRONG = {
    "no folder": (["--model", "x=/nonexistent"], "/nonexistent: no such folder"),
    "no name": (["--model", "=/tmp"], "--model '=/tmp' is not NAME=PATH"),
    "no path": (["--model", "x="], "--model 'x=' is not NAME=PATH"),
    "port": (["--port", "65536"], "port must be between 0 and 65535, not 65536"),
    "negative port": (["--port", "-1"], "port must be between 0 and 65535, not -1"),
    "no key file": (["--api-key-file", "/nonexistent"], "No such file or directory"),
    "no keys": (["--api-key-file", os.devnull], "holds no key"),
    "origin": (["--allow-origin", "https://a.com/"], "'https://a.com/' is no origin such as"),
    "no time": (["--body-timeout", "nan"], "body_timeout must be finite, not nan"),
    "no bytes": (["--body-bytes", "0"], "body_bytes must be between 1 and"),
    "no room": (["--max-waiting", "-1"], "max_waiting must be between 0 and"),
    "no limit": (["--limit-n", "-1"], "n must be between 0 and"),
    "no rows": (["--max-batch-size", "0"], "max_batch_size must be at least 1"),
}


@pytest.mark.parametrize(("options", "told"), cases(WRONG))
def test_wrong_options_are_told_in_one_line(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *options]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("fastgen: ") and told in err


def test_two_models_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    assert main(["serve", "--model", f"a={folder}", "--model", f"a={folder}"]) == 1
    assert capsys.readouterr().err == "fastgen: two models are named 'a'\n"


def test_an_address_that_cannot_be_had(tmp_path: Path) -> None:
    tiny = f"--model={write_checkpoint(tmp_path / 'tiny')}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {
            f"127.0.0.1:{port}": ["--port", str(port)],
            "203.0.113.7:0": ["--host", "203.0.113.7"],
            "no.such.host.:0": ["--host", "no.such.host."],
        }
        for address, options in wrong.items():
            with ServerProcess(tiny, "--log-level=warning", *options) as server:
                assert server.wait() == 1
                *_, last = server.output.splitlines()
                assert last == f"fastgen: cannot listen at {address}"
                assert "Traceback" not in server.output


def streams(port: int, body: Any, number: int = 8) -> Iterator[socket.socket]:
    for _ in range(number):
        yield begun(port, post(body))


def read_all(clients: list[socket.socket]) -> list[bytes]:
    def read(client: socket.socket) -> bytes:
        with closing(client):
            return everything(client)

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(read, clients))


def is_under_way(port: int, rows: int) -> bool:
    """Whether the metrics show so many rows."""
    shown = answer(port, get("/metrics")).body.decode()
    found = re.findall(r"^fastgen_(?:running|waiting)_completions\{.*\} (\S+)", shown, re.MULTILINE)
    return sum(map(float, found)) >= rows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_that_take_too_long_are_told_of_the_end(number: int) -> None:
    with ServerProcess("--drain-timeout", "0.5", "--max-batch-size", "8") as server:
        port = port_of(server.wait_until_ready())
        clients = list(streams(port, MANY))
        wait_until(lambda: is_under_way(port, 8 * 32))
        server.process.send_signal(number)
        for raw in read_all(clients):
            [reply] = replies(raw)
            *_, last, done = reply.body.decode().split("data: ")
            assert '"error":{"message":"cancelled' in last and done.startswith("[DONE]")
            assert '"type":"server_error"' in last
        assert server.wait() == 0
        assert "Traceback" not in server.output


def test_streams_that_end_in_time_lose_nothing(model: fastgen.Generator) -> None:
    """Meanwhile nobody else is let in."""
    asked = {**LONG, "max_tokens": 300}
    [wanted] = model.generate(asked["prompt"], max_new_tokens=300, temperature=0, ignore_eos=True)
    with ServerProcess("--drain-timeout", "600", "--max-batch-size", "4") as server:
        port = port_of(server.wait_until_ready())
        clients = [*streams(port, {**asked, "stream": True}), *streams(port, asked, 2)]
        wait_until(lambda: is_under_way(port, 10))
        server.terminate()
        wait_until(lambda: "Shutting down" in server.output)
        late = [late_answer(port) for _ in range(20)]
        assert {reply.status for reply in late if reply is not None} <= {503}
        *streamed, first, second = read_all(clients)
        for raw in streamed:
            assert text_of(raw) == wanted.completions[0].text
            assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        for raw in (first, second):
            [reply] = replies(raw)
            assert reply.json["choices"][0]["text"] == wanted.completions[0].text
        assert server.wait() == 0


def late_answer(port: int) -> Reply | None:
    try:
        raw = exchange(port, post(CANARY))
    except ConnectionRefusedError:
        return None
    assert raw == b"" or replies(raw)[0].headers["retry-after"]
    return replies(raw)[0] if raw else None


def test_a_second_signal_ends_it_at_once() -> None:
    with ServerProcess("--drain-timeout", "600", "--max-batch-size", "8") as server:
        port = port_of(server.wait_until_ready())
        with closing(begun(port, post(MANY))) as client:
            wait_until(lambda: is_under_way(port, 32))
            server.terminate()
            wait_until(lambda: "Shutting down" in server.output)
            server.terminate()
            assert server.wait() == 128 + signal.SIGTERM
            got = everything(client)
            assert b"[DONE]" not in got or b'"code":"unread"' in got, "it has waited for a stream"


def test_after_a_kill_the_same_port_serves_again(canary_text: str) -> None:
    port = random.randrange(20_000, 30_000)  # none that the system gives to whoever asks for any
    with ServerProcess("--port", str(port)) as server:
        server.wait_until_ready()
        with closing(begun(port, post(MANY))) as client:
            wait_until(lambda: is_under_way(port, 32))
            server.process.kill()
            assert b"[DONE]" not in everything(client)
        server.wait()
    with ServerProcess("--port", str(port)) as server:
        assert port_of(server.wait_until_ready()) == port
        assert canary(port) == canary_text


@pytest.mark.slow
def test_a_step_that_hangs_does_not_keep_the_process() -> None:
    command = [sys.executable, "-c", HUNG]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert "serving m at " in told
        port = port_of(told.split()[-1])
        sent = [post({**CANARY, "stream": True}), post(CANARY)]
        clients = [begun(port, each) for each in sent]
        wait_until(lambda: is_under_way(port, 2))
        process.terminate()
        streamed, whole = (replies(raw)[0] for raw in read_all(clients))
        assert process.wait() == 1
        assert b'{"error":' in streamed.body and b"[DONE]" in streamed.body
        assert (whole.status, whole.message) == (503, "this engine has been closed")
        assert "a step does not end" in process.stdout.read()


def test_the_log_has_ids_and_no_texts() -> None:
    secret = "Xyzzy the secret of the prompt"
    with ServerProcess() as server:
        port = port_of(server.wait_until_ready())
        sent = post({"prompt": secret, "max_tokens": 2, "user": secret}, "x-request-id: a.B-c_9")
        assert answer(port, sent).headers["x-request-id"] == "a.B-c_9"
        given = answer(port, post({**CANARY, "stream": True})).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", given)
        refused = answer(
            port, post({"prompt": secret, secret: 1}, f"authorization: Bearer {secret}")
        )
        assert refused.status == 400
        wait_until(lambda: f"{refused.headers['x-request-id']} POST" in server.output)
        assert "a.B-c_9 POST '/v1/completions' 200" in server.output
        assert f"{given} POST '/v1/completions' 200" in server.output
        assert "Xyzzy" not in server.output


def test_nothing_can_be_written_into_the_log() -> None:
    """A line stays a line, whatever its path and its id are."""
    forged = "2026-01-01 00:00:00,000 INFO fastgen.server: forged"
    quoted = forged.replace(" ", "%20")
    ids = ["a\tb", "a b", "a" * 65, "é", "%0a", "a;b", '"', "\x9b2J"]
    paths = [f"/%0a{quoted}", f"/%0d%0a{quoted}", f"/%E2%80%A8{quoted}", f"/%C2%85{quoted}",
             f"/%1b[2J{quoted}", f"/%00{quoted}", "/%25s%25d", f"/v1/models/%0A{quoted}",
             ]  # fmt: skip
    with ServerProcess() as server:
        port = port_of(server.wait_until_ready())
        for path in paths:
            assert answer(port, get(path)).status == 404
        for name in ids:
            given = answer(port, get("/health/live", f"x-request-id: {name}"))
            assert re.fullmatch("[0-9a-f]{16}", given.headers["x-request-id"])
        assert answer(port, head("A'%s\"", "/", "connection: close")).status in (400, 404)
        last = answer(port, get("/health/live")).headers["x-request-id"]
        wait_until(lambda: last in server.output)
        server.terminate()
        assert server.wait() == 0
    lines = [line for line in re.split("[\n\r\u2028\x85]", server.output) if line]
    assert all(
        re.match(r"fastgen: serving |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", x) for x in lines
    )
    assert not [line for line in lines if line.startswith("2026-01-01")]
    assert "\x1b" not in server.output and "\0" not in server.output
