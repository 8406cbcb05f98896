"""The ASGI application: routes, who may call them, and what becomes of errors."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen.server import endpoints, tokens
from fastgen.server.cors import Cors
from fastgen.server.errors import ApiError, api_error
from fastgen.server.schema import schema_of
from fastgen.server.scoring import score
from fastgen.server.service import Service

logger = logging.getLogger("fastgen.server")
OPEN_PATHS = ("/health", "/health/live", "/health/ready")  # for these no key is needed
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_GONE = 499  # nobody reads it; it stands in the log
_INSTEAD = "this server continues text: use /v1/completions"

Handler = Callable[[Request], Awaitable[Any]]


def make_app(service: Service) -> Starlette:
    """OpenAI's completions, and fastgen's own: for uvicorn, or to be mounted in another app."""
    routes = [
        Route("/v1/completions", _answering(endpoints.completions), methods=["POST"]),
        Route("/v1/score", _answering(score), methods=["POST"]),
        Route("/v1/models", _answering(endpoints.models), methods=["GET"]),
        Route("/v1/models/{name:path}", _answering(endpoints.model), methods=["GET"]),
        Route("/tokenize", _answering(tokens.tokenize), methods=["POST"]),
        Route("/detokenize", _answering(tokens.detokenize), methods=["POST"]),
        Route("/tokenizer_info", _answering(tokens.tokenizer_info), methods=["GET"]),
        Route("/health", _answering(endpoints.ready), methods=["GET"]),
        Route("/health/live", _answering(endpoints.live), methods=["GET"]),
        Route("/health/ready", _answering(endpoints.ready), methods=["GET"]),
        Route("/metrics", _answering(endpoints.metrics), methods=["GET"]),
        Route("/openapi.json", _answering(_schema), methods=["GET"]),
        Route("/v1/chat/completions", _answering(_no_chat), methods=["POST"]),
        Route("/v1/embeddings", _answering(_no_embeddings), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(_Calls, service=service),
            *_cors(service.allow_origins),
            Middleware(_Door, service=service),
        ],
        exception_handlers={HTTPException: _refused},
    )
    app.router.redirect_slashes = False  # it would name the host that the caller says this is
    app.state.service = service
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """It stands before the keys: a browser asks first, without one, and a page may read what an
    error says."""
    return [Middleware(Cors, origins=origins)] if origins else []


def _answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """The handler's answer, an object or a Response, as a Response; so are its errors."""

    async def answer(request: Request) -> Response:
        try:
            answered = await handler(request)
            return answered if callable(answered) else JSONResponse(answered)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except asyncio.CancelledError:  # by uvicorn, when the end has taken too long
            if not request.app.state.service.ends:
                raise
            return _error(ApiError(503, "the server is shutting down", code="unavailable"), request)
        except Exception as error:
            told = api_error(error)
            if told.status == 500:
                logger.error("%s failed", request.scope["state"]["id"], exc_info=error)
            return _error(told, request)

    return answer


def _error(error: ApiError, request: Request) -> Response:
    service: Service = request.app.state.service
    if error.status in (401, 429, 503):
        service.metrics.refusals.labels(error.code or error.kind).inc()
    return JSONResponse(error.body, error.status, error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    """What the router has no route for."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    why = "no such path" if error.status_code == 404 else error.detail
    told = ApiError(error.status_code, f"{request.method} {path}: {why}", code="unknown_url")
    return JSONResponse(told.body, told.status, error.headers)


async def _schema(request: Request) -> dict[str, Any]:
    return schema_of(request.app.state.service)


async def _no_chat(request: Request) -> None:
    raise ApiError(404, f"GPT-2 has no chat format; {_INSTEAD}", code="unknown_url")


async def _no_embeddings(request: Request) -> None:
    raise ApiError(404, f"there are no embeddings here; {_INSTEAD}", code="unknown_url")


class _Calls:
    """Around every call: its id, a line in the log, a count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, began = Request(scope), time.perf_counter()
        given = request.headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["id"] = name
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path: there are many
            self._service.metrics.requests.labels(route, str(status)).inc()
            logger.info("%s %s %r %d %.1f ms", name, scope["method"], scope["path"][:100], status,
                        1e3 * (time.perf_counter() - began))  # fmt: skip


class _Door:
    """Lets in who has a key that is known, and headers of a size that is allowed."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["salt"] = None
            self._check_headers(scope)
            # Where this is mounted in another app, the path begins with the place.
            if scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_PATHS:
                authorization = Request(scope).headers.get("authorization", "")
                scope["state"]["salt"] = self._service.keys.salt_of(authorization)
        except ApiError as error:
            self._service.metrics.refusals.labels(error.code or error.kind).inc()
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_headers(self, scope: Scope) -> None:
        """What arrives in one piece has not been measured by the connection."""
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        most = self._service.limits.header_bytes
        if size > most:
            raise ApiError(431, f"the headers exceed {most} bytes")
