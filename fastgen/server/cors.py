"""Which web pages may read what the server says: the headers of answers, and preflight requests."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from fastgen.server.errors import ApiError

_METHODS = ("GET", "POST")


class Cors(CORSMiddleware):
    """For pages of these origins ("*": of all). Cookies are never let through: keys come in a
    header."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """A refusal is an error of the server's form."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        if not self.is_allowed_origin(request_headers["origin"]):
            told = "pages of this origin may not call this server: see --allow-origin"
        elif request_headers["access-control-request-method"] not in _METHODS:
            told = f"pages may only use {' and '.join(_METHODS)}"
        else:
            told = "pages of a public network may not call this server"
        about_body = ("content-type", "content-length")
        headers = {name: v for name, v in response.headers.items() if name not in about_body}
        return JSONResponse(ApiError(400, told).body, 400, headers)


def answer_headers(origins: Sequence[str], origin: bytes | None) -> list[tuple[bytes, bytes]]:
    """Headers that let a page of `origin` read an answer; for answers that no middleware sees."""
    if not origins:
        return []
    vary = (b"vary", b"Origin")
    if "*" in origins:
        return [(b"access-control-allow-origin", b"*"), vary]
    if origin is None or origin.decode("latin-1") not in origins:
        return [vary]
    return [(b"access-control-allow-origin", origin), vary]
