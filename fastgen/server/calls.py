"""What the handlers of all paths need: the service, salts, work that must not block the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from fastgen.server.completions import LONGEST_SALT, text
from fastgen.server.errors import ApiError
from fastgen.server.service import Service
from fastgen.server.streaming import as_json

T = TypeVar("T")
_QUICK_SIZE = 1024  # options' values, or tokens of an answer: some milliseconds


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def salt_of(request: Request, own: Any) -> str | None:
    """Prompts of different keys, and of different salts of one key, share nothing."""
    key_salt: str | None = request.scope["state"]["salt"]
    if own is not None and len(text("cache_salt", own)) > LONGEST_SALT:
        told = f"cache_salt: more than {LONGEST_SALT} characters"
        raise ApiError(400, told, "cache_salt")
    parts = [part for part in (key_salt, own) if part is not None]
    return ":".join(parts) if parts else None


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do short work at once, long work on another thread, so that the event loop is free."""
    if size <= _QUICK_SIZE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


def json_response(value: dict[str, Any] | bytes) -> Response:
    body = value if isinstance(value, bytes) else as_json(value)
    return Response(body, media_type="application/json")
