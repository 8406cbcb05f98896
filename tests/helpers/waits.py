"""Waiting in tests: for a condition or an event, never for a time to pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

# Seconds after which something hangs, on a machine that is slow and busy with other things. Nothing
# is proven by it: a test that is right never waits so long.
WITHIN = 180.0


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


async def wait_in_loop_until(condition: Callable[[], Any]) -> None:
    """The same, while the event loop goes on."""
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.002)
