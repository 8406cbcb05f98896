"""EngineFacade: what AsyncEngine and ThreadedEngine share. Each adds its own way of waiting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastgen.engine.inbox import deadline_in
from fastgen.engine.requests import Request
from fastgen.errors import OptionError
from fastgen.frontends.engine_thread import EngineThread, Notify, QueueConfig, RequestHandle
from fastgen.frontends.generator import Generator
from fastgen.frontends.jobs import Job
from fastgen.text.tokenizer import Tokenizer


class SubmitOptions(NamedTuple):
    """How requests are queued, as callers say it: keywords of every method that submits some.

    Attributes:
        timeout: seconds after which rows still running end with "timeout"; None: no limit.
        priority: among all that wait, -1000 to 1000; lower is sooner.
        cache_salt: prompts with different salts share no computed beginnings.
    """

    timeout: float | None
    priority: int
    cache_salt: str | None


class EngineFacade:
    """A model's engine on a thread of its own, and how requests reach it.

    Args:
        model: stays the caller's: closing the engine does not close it.
        queue_config: how much may wait, and for how long.
    """

    def __init__(self, model: Generator, queue_config: QueueConfig | None = None) -> None:
        self.thread = EngineThread(model, queue_config or QueueConfig())
        self._make = model.job_maker

    @property
    def ready(self) -> bool:
        """Whether requests are taken and, if there are any, steps make progress."""
        return self.thread.ready

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self.thread.model.tokenizer
        if tokenizer is None:
            raise OptionError("this model has no tokenizer", "text")
        return tokenizer

    def _submit(
        self, jobs: Sequence[Job], notify: Notify, options: SubmitOptions, *, streams: bool = False
    ) -> list[RequestHandle]:
        """Put all jobs into the engine, or none, as EngineThread.submit; the timeout begins now."""
        return self.thread.submit(
            jobs,
            notify,
            streams=streams,
            deadline=deadline_in(options.timeout),
            priority=options.priority,
            cache_salt=options.cache_salt,
        )


def requests_of(handles: Iterable[RequestHandle]) -> list[Request]:
    """The requests of handles that have been submitted."""
    return [handle.request for handle in handles if handle.request is not None]
