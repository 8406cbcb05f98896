"""A real server on loopback: on a thread of the test's process, or as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastgen.frontends.generator import Generator
from fastgen.server.run import Address, Server
from fastgen.server.service import Service
from processes import started
from waits import WITHIN, wait_until

MODEL = "bundled"


class RunningServer:
    """A Service on a thread; `service` and its models can be looked into and broken."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.server = Server(service, Address(port=0))
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve())

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.loop = self.server._loop

    def stop(self) -> None:
        """As SIGTERM would."""
        self.server.should_exit = True
        self._thread.join(WITHIN)
        assert not self._thread.is_alive(), "the server does not end"

    @property
    def thread_id(self) -> int | None:
        """Of its event loop's thread."""
        return self._thread.ident

    @property
    def port(self) -> int:
        port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return self.server.url


@contextmanager
def serving(models: dict[str, Generator], **options: Any) -> Iterator[RunningServer]:
    """Serve these models, named; `options` are Service's."""
    running = RunningServer(Service(models, **options))
    running.start()
    try:
        yield running
    finally:
        running.stop()


class ServerProcess:
    """`fastgen serve` with these arguments, at any free port unless they say otherwise."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "fastgen", "serve", *arguments]
        if "--port" not in arguments and "--uds" not in arguments:
            command += ["--port", "0"]
        self._started = started(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_until_ready(self) -> str:
        """Its address: http://host:port, or unix:path."""
        found: list[str] = []

        def is_ready() -> bool:
            found[:] = re.findall(r"^fastgen: serving .* at (\S+)$", self.output, re.MULTILINE)
            assert found or self.process.poll() is None, self.output
            return bool(found)

        wait_until(is_ready)
        return found[0]

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait(WITHIN)
        self._reader.join(WITHIN)
        return code

    def __enter__(self) -> ServerProcess:
        self.process = self._started.__enter__()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.process.kill()
            self._reader.join(WITHIN)
        finally:
            self._started.__exit__(None, None, None)
