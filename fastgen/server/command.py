"""`fastgen serve`: its options, and what they make."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from fastgen.engine.request_limits import RequestLimits
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.frontends.generator import Generator
from fastgen.server.limits import ServerLimits

BUNDLED = "fastgen-bundled"
_QUEUE_CONFIG = ("max_waiting", "max_unread", "stall_timeout")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this "
        "machine only)")  # fmt: skip
    add("--port", type=int, default=8000, help="port; 0 is any free one (default: 8000)")
    add("--uds", metavar="PATH", help="a Unix socket instead")
    add("--model", dest="models", action="append", default=[], metavar="NAME=PATH",
        help="serve this folder or hub id under this name; may be repeated; without NAME= it has "
        "the folder's (default: the bundled model)")  # fmt: skip
    add("--api-key-file", type=Path, metavar="FILE", help="keys that are let in, one a line")
    add("--allow-origin", dest="allow_origins", action="append", default=[], metavar="ORIGIN",
        help="let web pages of this origin, such as https://example.com, call the server from a "
        "browser; may be repeated; * is every page")  # fmt: skip
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    group = parser.add_argument_group("limits of the server").add_argument
    texts = _described(ServerLimits) | _described(QueueConfig)
    for field in (*fields(ServerLimits), *_fields(QueueConfig)):
        _add(group, field.name, type(field.default), field.default, texts[field.name])
    group = parser.add_argument_group("limits of a request").add_argument
    texts = _described(RequestLimits)
    for name, bound in vars(RequestLimits.for_serving()).items():
        kind = float if isinstance(bound, float) else int
        _add(group, f"limit_{name}", kind, bound, f"the most: {texts[name]}")


def _described(kind: Any) -> dict[str, str]:
    """What a class says of its attributes: "names: text", over several lines, text without % ."""
    _, _, told = inspect.getdoc(kind).partition("Attributes:\n")  # type: ignore[union-attr]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", told, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()).rstrip("."))
    return found


def _add(add: Callable[..., Any], name: str, kind: Any, default: Any, text: str) -> None:
    told = "no limit but the context" if default is None else f"{default}"
    add(f"--{name.replace('_', '-')}", type=kind, default=default,
        metavar="SECONDS" if name.endswith("timeout") or name == "keep_alive" else "N",
        help=f"{text} (default: {told})")  # fmt: skip


def _fields(kind: Any) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.name in _QUEUE_CONFIG and f.default is not MISSING]


def run(arguments: argparse.Namespace, load: Callable[[str | None], Generator]) -> int:
    """Load the models, and serve them until the process is told to end."""
    try:
        from fastgen.server.run import Address, serve
        from fastgen.server.service import Keys, Service, checked_origins
    except ModuleNotFoundError as error:
        message = f"fastgen serve needs {error.name}: pip install 'fastgen[server]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    logging.basicConfig(level=arguments.log_level.upper(), stream=sys.stderr,
                        format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # fmt: skip
    given = vars(arguments)
    keys = Keys() if arguments.api_key_file is None else Keys.from_file(arguments.api_key_file)
    allow_origins = checked_origins(arguments.allow_origins)
    limits = ServerLimits(**{field.name: given[field.name] for field in fields(ServerLimits)})
    request_limits = RequestLimits(
        **{f.name: given[f"limit_{f.name}"] for f in fields(RequestLimits)}
    )
    queue_config = QueueConfig(**{name: given[name] for name in _QUEUE_CONFIG})
    address = Address(host=arguments.host, port=arguments.port, uds=arguments.uds)
    with ExitStack() as models:
        served: dict[str, Generator] = {}
        for name, path in _named(arguments):
            if name in served:
                raise ValueError(f"two models are named {name!r}")
            served[name] = models.enter_context(load(path))
            served[name].warmup()
        service = Service(
            served,
            limits=limits,
            request_limits=request_limits,
            queue_config=queue_config,
            keys=keys,
            allow_origins=allow_origins,
        )
        serve(service, address)
    return 0


def _named(arguments: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Names and paths of the models."""
    named: list[tuple[str, str | None]] = []
    for given in arguments.models:
        name, equals, path = given.partition("=")
        if not equals:
            name, path = Path(given).resolve().name, given
        if not name or not path:
            raise ValueError(f"--model {given!r} is not NAME=PATH")
        named.append((name, path))
    return named or [(BUNDLED, None)]
