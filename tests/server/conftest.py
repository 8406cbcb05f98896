"""What the server's tests share: a model, a server and clients, made once for each file.

A file that needs other sizes or limits has a fixture of its own: `load_options`, `limits`,
`hasty_limits`, or `model` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import fastgen
from engine_harness import assert_idle
from fastgen.server.limits import ServerLimits
from raw_client import assert_unharmed, canary_of
from server_harness import MODEL, RunningServer, serving
from waits import wait_until


@pytest.fixture(scope="module")
def load_options() -> dict[str, Any]:
    """What `fastgen.load` is given for `model`."""
    return {"max_batch_size": 8}


@pytest.fixture(scope="module")
def model(load_options: dict[str, Any]) -> Iterator[fastgen.Generator]:
    """The bundled model; in the end nothing is left of what was asked of it."""
    with fastgen.load(**load_options) as loaded:
        yield loaded
        wait_until(lambda: not loaded.engine.num_unfinished)
        assert_idle(loaded.engine)


@pytest.fixture(scope="module")
def limits() -> ServerLimits:
    """Those of `server`."""
    return ServerLimits()


@pytest.fixture(scope="module")
def server(model: fastgen.Generator, limits: ServerLimits) -> Iterator[RunningServer]:
    with serving({MODEL: model}, limits=limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def canary_text(model: fastgen.Generator) -> str:
    """What `raw_client.canary` has to return."""
    return canary_of(model)


@pytest.fixture
def hasty(
    model: fastgen.Generator, hasty_limits: ServerLimits, canary_text: str
) -> Iterator[RunningServer]:
    """One that cuts slow clients off. Others use `server`, however slow this machine is."""
    with serving({MODEL: model}, limits=hasty_limits) as running:
        yield running
        assert_unharmed(running, canary_text)


@pytest.fixture
def unharmed(
    server: RunningServer, canary_text: str, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Whatever clients do is no fault of the server, and no error in its log."""
    yield
    assert_unharmed(server, canary_text)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
