"""HTTP/1.1 connections with bounds that uvicorn leaves open: silent and never-reading clients are
cut off, and bytes that are no HTTP get an answer of the server's form.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from collections.abc import Sequence
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgen.server.cors import answer_headers
from fastgen.server.errors import ApiError
from fastgen.server.limits import ServerLimits

_SEND_BUFFER = 128 << 10  # bytes; Linux takes twice as many
_ORIGIN = re.compile(rb"\r?\norigin:[ \t]*([^\r\n]*[^\r\n \t])[ \t]*\r?\n", re.IGNORECASE)
_LINGER = 1.0  # seconds for which a refused client may go on sending, so that it sees why


class BoundedProtocol(H11Protocol):
    """See `bounded`."""

    limits = ServerLimits()
    allow_origins: Sequence[str] = ()
    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None
    _is_refused = False  # what it sends is no longer looked at

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whatever is left unread is waited for
        # The system would take megabytes, and show for long that a slow client takes nothing.
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        self._watch_headers()
        self._read_ahead()

    def pause_writing(self) -> None:
        """The client does not read its answer."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _watch_reading(self) -> None:
        left, timeout = self.transport.get_write_buffer_size(), self.limits.send_timeout
        self._reading_due = self.loop.call_later(timeout, self._look_at_reading, left)

    def _look_at_reading(self, left: int) -> None:
        """It has to have taken something since."""
        if self.transport.get_write_buffer_size() < left:
            self._watch_reading()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What was received is not HTTP, or has more headers than are allowed."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer is under way: there is no room for another
            return
        self._is_refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        too_large = getattr(sys.exception(), "error_status_hint", 400) == 431
        error = ApiError(400, "this is not a valid HTTP request")
        if too_large:
            error = ApiError(431, f"the headers exceed {self.limits.header_bytes} bytes")
        body, reason = json.dumps(error.body).encode(), HTTPStatus(error.status).phrase.encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *answer_headers(self.allow_origins, self._origin()),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)

    def _origin(self) -> bytes | None:
        """The page's that has sent what is refused; None where the header has not been seen."""
        if self.cycle is not None and not self.cycle.response_complete:
            return dict(self.headers).get(b"origin")
        head, _ = self.conn.trailing_data
        found = _ORIGIN.search(head)
        return None if found is None else found[1]

    def _watch_headers(self) -> None:
        """The time for a request's headers begins with the connection, or with their first byte.

        It is also the time for what is left of a body that nobody waits for any more.
        """
        theirs, ours = self.conn.their_state, self.conn.our_state
        if theirs is not h11.IDLE and not (theirs is h11.SEND_BODY and ours is h11.DONE):
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
        elif self._headers_due is None:
            timeout = self.limits.header_timeout
            self._headers_due = self.loop.call_later(timeout, self.transport.abort)

    def _read_ahead(self) -> None:
        """Read on while a request is under way: otherwise its client's disconnect is not seen."""
        ahead, _ = self.conn.trailing_data
        if self.conn.their_state is h11.DONE and len(ahead) <= self.limits.header_bytes:
            self.flow.resume_reading()


def bounded(limits: ServerLimits, allow_origins: Sequence[str] = ()) -> type[BoundedProtocol]:
    """The protocol with these limits, for uvicorn's `http`."""
    own = {"limits": limits, "allow_origins": allow_origins}
    return type("BoundedProtocol", (BoundedProtocol,), own)
