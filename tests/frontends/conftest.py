"""What the tests of engines on threads share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastgen
from engine_harness import assert_idle
from waits import wait_until


@pytest.fixture(scope="module")
def model() -> Iterator[fastgen.Generator]:
    with fastgen.load(max_batch_size=4, max_seq_len=256) as loaded:
        yield loaded


@pytest.fixture
def left_idle(model: fastgen.Generator) -> Iterator[None]:
    """Afterwards nothing runs and nothing has leaked, and the model works without an engine."""
    yield
    wait_until(lambda: model.engine.num_unfinished == 0)
    assert len(model.generate("And", max_new_tokens=2)) == 1
    assert_idle(model.engine)
