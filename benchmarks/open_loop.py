"""An open-loop load: requests come when they come, whether earlier ones have ended or not.

Times count from when a request was due, so a server that makes its callers wait cannot hide it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.bench.interleave import percentile

# One request: sends its prompt, and yields once for each token, when it comes.
Send = Callable[[list[int], int], AsyncIterator[None]]


@dataclass
class Outcome:
    """Seconds from when the request was due to each of its tokens."""

    tokens: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token(self) -> float:
        return self.tokens[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests of a Poisson process come, `rate` a second."""
    uniforms = random.Random(seed)
    now, due = 0.0, []
    for _ in range(count):
        now += uniforms.expovariate(rate)
        due.append(now)
    return due


async def drive(
    send: Send, prompts: Sequence[list[int]], new_tokens: int, due: Sequence[float], limit: float
) -> list[Outcome]:
    """Send each prompt when it is due; what has not ended `limit` seconds after that is lost."""
    start = time.perf_counter()

    async def one(prompt: list[int], at: float) -> Outcome:
        outcome = Outcome()
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        try:
            async for _ in send(prompt, new_tokens):
                outcome.tokens.append(time.perf_counter() - start - at)
            if len(outcome.tokens) != new_tokens:
                outcome.error = f"{len(outcome.tokens)} of {new_tokens} tokens"
        except asyncio.CancelledError:
            outcome.error = "too late"
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"[:200]
        return outcome

    tasks = [asyncio.ensure_future(one(*each)) for each in zip(prompts, due, strict=True)]
    _, late = await asyncio.wait(tasks, timeout=due[-1] + limit)
    for task in late:
        task.cancel()
    return await asyncio.gather(*tasks)


def summary(
    outcomes: Sequence[Outcome], seconds: float, *, first_token: float, gap: float
) -> dict[str, Any]:
    """Milliseconds at the middle and at the 99th of a hundred, and what came in good time.

    Args:
        seconds: of the whole run, for rates.
        first_token, gap: what a request may take to its first token, and between two in the mean,
            to be of use.
    """
    ended = [outcome for outcome in outcomes if outcome.error is None]
    gaps = [gap for outcome in ended for gap in outcome.gaps]

    def is_good(outcome: Outcome) -> bool:
        mean = sum(outcome.gaps) / max(1, len(outcome.gaps))
        return outcome.first_token <= first_token and mean <= gap

    record: dict[str, Any] = {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(ended),
        "goodput": round(sum(map(is_good, ended)) / seconds, 3),
        "tokens_a_second": round(sum(len(outcome.tokens) for outcome in outcomes) / seconds, 1),
    }
    for name, values in (("ttft", [o.first_token for o in ended]), ("gap", gaps)):
        for share in (0.5, 0.99):
            at = round(1e3 * percentile(values, share), 2) if values else None
            record[f"{name}_p{share * 100:g}_ms"] = at
    return record
