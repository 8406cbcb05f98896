"""Bodies of requests: bounded in size, depth and time; strict JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from fastgen.server.errors import ApiError
from fastgen.server.limits import ServerLimits

_LINGER = 1.0  # seconds for which a body that is too large is read, so that its sender sees why
# What json makes objects of in some 50 ms, in which no other thread runs. Names of members, and the
# objects that they are in, take it several times as long as values.
_MOST_VALUES = 300_000
_MOST_NAMES = 20_000


async def read_json(request: Request, limits: ServerLimits) -> dict[str, Any]:
    """The body, an object.

    Raises:
        ApiError: too large (413), too slow (408), or not one object of strict JSON (400).
        ClientDisconnect: the client has gone.
    """
    body = await _read(request, limits)
    loop = asyncio.get_running_loop()
    if len(body) <= 4096:
        return parsed(body, limits.json_depth)
    return await loop.run_in_executor(None, parsed, body, limits.json_depth)


async def _read(request: Request, limits: ServerLimits) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared[:20]) > limits.body_bytes
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            if not too_large:
                async for chunk in request.stream():
                    body += chunk
                    if too_large := len(body) > limits.body_bytes:
                        break
    except TimeoutError:
        raise ApiError(408, f"the body took over {limits.body_timeout:g} seconds") from None
    if too_large:
        await _swallow(request, limits)
        raise ApiError(413, f"the body is larger than {limits.body_bytes} bytes")
    return bytes(body)


async def _swallow(request: Request, limits: ServerLimits) -> None:
    """Read a little more of it: whoever is still sending would not see the response."""
    left = 4 * limits.body_bytes
    try:
        async with asyncio.timeout(_LINGER):
            while left > 0:
                message = await request.receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return


def parsed(body: bytes, max_depth: int) -> dict[str, Any]:
    """One JSON object: UTF-8, no NaN or Infinity, no key twice, not too deep."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    try:
        check_shape(body, max_depth)
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            where = f" (line {error.lineno}, column {error.colno})"
        raise ApiError(400, f"the body is not valid JSON{where}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def check_shape(body: bytes, max_depth: int) -> None:
    """Raise ApiError for what would take json long, or much memory: too deep, too many values.

    Brackets, commas and colons within strings are not counted.
    """
    too_many = ApiError(400, f"the body holds more than {_MOST_VALUES} values")
    if body.count(b'"') > 2 * _MOST_VALUES:
        raise too_many
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b":") > _MOST_NAMES:
        raise ApiError(400, f"the body holds more than {_MOST_NAMES} names")
    outside = outside.translate(None, _PLAIN)
    if len(outside) > _MOST_VALUES:
        raise too_many
    depth = 0
    for mark in outside.replace(b",", b""):
        depth += 1 if mark in b"[{" else -1
        if depth > max_depth:
            raise ApiError(400, f"the body is nested deeper than {max_depth} levels")


_PLAIN = bytes(set(range(256)) - set(b"[]{},"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ApiError(400, "the body has an object with the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body holds {name}, which is not JSON")
