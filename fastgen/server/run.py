"""A server process: uvicorn, with an end that loses nothing.

SIGTERM or Ctrl-C: no new requests, those under way end (for a while; then they are told that they
were cancelled), exit code 0. A second one ends the process at once. Exit code 1: a step hung, and
could not be waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import uvicorn

from fastgen.checks import integer
from fastgen.server.app import make_app
from fastgen.server.protocol import bounded
from fastgen.server.service import Service

logger = logging.getLogger("fastgen.server")
_GRACE = 12.0  # seconds beyond the drain: a step that hangs is waited for, responses are written


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens: a host and port (0: any free one), or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None

    def __post_init__(self) -> None:
        integer("port", self.port, 0, 65535)


class Server(uvicorn.Server):
    """Serves one Service until it is told to end."""

    def __init__(self, service: Service, address: Address) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=address.host,
                port=address.port,
                uds=address.uds,
                http=bounded(limits, service.allow_origins),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=max(1, round(limits.keep_alive)),
                timeout_graceful_shutdown=round(limits.drain_timeout + _GRACE),
            )
        )
        self._service, self._address = service, address
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        _remove_stale(self._address.uds)
        await super().startup(sockets)
        if self.started:
            print(f"fastgen: serving {', '.join(self._service.models)} at {self.url}", flush=True)

    @property
    def url(self) -> str:
        """Where it listens, once it has started."""
        if self._address.uds is not None:
            return f"unix:{self._address.uds}"
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._address.uds is not None:  # now: another server may take its place while we drain
            with contextlib.suppress(OSError):
                os.unlink(self._address.uds)
        draining = asyncio.ensure_future(self._service.drain())
        await super().shutdown(sockets)
        await draining

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises captured signals again at its end; the process would die of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit)
                  for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.begin_to_end)


def serve(service: Service, address: Address) -> None:
    """Serve until SIGTERM or Ctrl-C; to be called in the main thread.

    Raises:
        OSError: the address cannot be had.
    """
    server = Server(service, address)
    with contextlib.suppress(SystemExit):  # uvicorn's, which has logged why
        server.run()
    if not server.started:
        raise OSError(f"cannot listen at {address.uds or f'{address.host}:{address.port}'}")
    if service.is_stuck:
        logger.critical("a step does not end; the process ends without it")
        os._exit(1)


def _remove_stale(path: str | None) -> None:
    """A socket that nobody listens at any more, left by a process that was killed.

    Raises:
        OSError: somebody listens; asyncio would take the path away from them.
    """
    if path is None or not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, f"Address {path!r} is already in use")
    os.unlink(path)
