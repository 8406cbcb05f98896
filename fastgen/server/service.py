"""What a server serves: models by name, keys, limits, and how it comes to an end."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastgen.engine.request_limits import RequestLimits
from fastgen.errors import OptionError
from fastgen.frontends.async_engine import AsyncEngine
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.frontends.fair_lock import FairLock
from fastgen.frontends.generator import Generator
from fastgen.server.errors import ApiError
from fastgen.server.limits import ServerLimits
from fastgen.server.metrics import Metrics

logger = logging.getLogger("fastgen.server")
_LONGEST_KEY = 4096
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[1-9][0-9]{0,4}))?"
)


@dataclass(frozen=True)
class ServedModel:
    name: str
    generator: Generator
    engine: AsyncEngine
    created: int

    @property
    def max_seq_len(self) -> int:
        return self.generator.plan.limits.max_seq_len


class Keys:
    """API keys; without any, everybody has access. Compared in constant time."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """One a line; empty lines and lines that begin with # are left out.

        Raises:
            ValueError: there is none: a server that is to be locked must not stand open.
        """
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{path} holds no key")
        if not all(key.isascii() for key in keys):
            raise ValueError(f"{path} holds a key with letters that HTTP's headers have not")
        return cls(keys)

    @property
    def needed(self) -> bool:
        return bool(self._digests)

    def salt_of(self, authorization: str) -> str | None:
        """What keeps the key's cached prompts apart from other keys'; None where none is needed.

        Raises:
            ApiError: the header holds no key that is known.
        """
        if not self.needed:
            return None
        kind, _, key = authorization.partition(" ")
        found = _digest(key.strip() if kind.lower() == "bearer" else "")
        known = [hmac.compare_digest(found, digest) for digest in self._digests]
        if not any(known) or len(authorization) > _LONGEST_KEY:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY",
                           code="invalid_api_key")  # fmt: skip
        return found.hex()


def checked_origins(origins: Sequence[str]) -> list[str]:
    """Origins as browsers write them, or "*" for all.

    Raises:
        OptionError: one is such that no browser would ever send it.
    """
    for origin in origins:
        default_ports = {"http": ("80",), "https": ("443",)}.get(origin.partition(":")[0], ())
        found = _ORIGIN.fullmatch(origin)
        if origin != "*" and (found is None or found["port"] in default_ports):
            raise OptionError(
                f"{origin[:100]!r} is no origin such as https://example.com or "
                "http://localhost:3000 (lower case, no path, no default port), nor *",
                "allow_origins",
            )
    return list(origins)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Service:
    """Models that share one processor. They stay the caller's; `close` ends what they generate.

    `allow_origins`: of the web pages that may call this server from a browser; "*" is all.

    It is made where no event loop runs yet, and belongs to the one that first asks it something.
    """

    def __init__(
        self,
        models: Mapping[str, Generator],
        *,
        limits: ServerLimits | None = None,
        request_limits: RequestLimits | None = None,
        queue_config: QueueConfig | None = None,
        keys: Keys | None = None,
        allow_origins: Sequence[str] = (),
    ) -> None:
        if not models:
            raise ValueError("a server needs a model")
        self.allow_origins = checked_origins(allow_origins)
        self.limits, self.keys = limits or ServerLimits(), keys or Keys()
        queue_config = queue_config or QueueConfig()
        if len(models) > 1:
            queue_config = replace(queue_config, fair_lock=FairLock())
        created = int(time.time())
        self.models: dict[str, ServedModel] = {}
        for name, generator in models.items():
            generator.engine.limits = request_limits or RequestLimits.for_serving()
            self.models[name] = ServedModel(
                name, generator, AsyncEngine(generator, queue_config), created
            )
        engines = {name: generator.engine for name, generator in models.items()}
        self.metrics = Metrics(engines, lambda: not self.troubles)
        for name, model in self.models.items():
            model.engine.thread.observe = partial(self.metrics.ended, name)
        self.ends = False

    @property
    def troubles(self) -> dict[str, str]:
        """Why which model is not ready; empty if all are."""
        found = {}
        for name, model in self.models.items():
            thread = model.engine.thread
            if thread.failure is not None:
                found[name] = "cannot go on"
            elif self.ends:
                found[name] = "is shutting down"
            elif not thread.ready:
                found[name] = "makes no progress"
        return found

    @property
    def is_lost(self) -> bool:
        """Whether only a new process can help."""
        return any(model.engine.thread.failure is not None for model in self.models.values())

    @property
    def is_stuck(self) -> bool:
        """Whether something is still under way after `close`: a step does not end."""
        return any(model.generator.engine.num_unfinished for model in self.models.values())

    def model(self, name: str) -> ServedModel:
        """The model of this name; without a name, the only one.

        Raises:
            ApiError: there is none of this name.
        """
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            names = ", ".join(self.models)
            told = f"the model {name[:100]!r} does not exist" if name else "model is missing"
            raise ApiError(404 if name else 400, f"{told}; this server has: {names}", "model",
                           "model_not_found")  # fmt: skip
        return self.models[name]

    def begin_to_end(self) -> None:
        """Take no more requests."""
        self.ends = True
        for model in self.models.values():
            model.engine.thread.refuse("is shutting down")

    async def drain(self) -> None:
        """Let requests under way end, for a while; cancel the others."""
        self.begin_to_end()
        engines = [model.engine for model in self.models.values()]
        ended = await asyncio.gather(*(e.drain(self.limits.drain_timeout) for e in engines))
        if not all(ended):
            logger.warning("requests were cancelled after %g s", self.limits.drain_timeout)
        await self.close()

    async def close(self) -> None:
        """End everything that is generated."""
        self.begin_to_end()
        await asyncio.gather(*(model.engine.close() for model in self.models.values()))
