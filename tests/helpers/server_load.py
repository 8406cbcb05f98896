"""Many different callers of a server at once, and what each of them should have."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import threading
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import fastgen
from engine_harness import assert_idle
from engine_threads import listeners_of
from fastgen import SamplingParams
from server_harness import MODEL, RunningServer, serving
from waits import wait_until

AT_ONCE = 96


TEXT = """And it came to pass in those days, when all the people of Israel went up from the land of
Egypt, that the LORD said unto the king: Let her go to the house that he gave unto his son."""


LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 1.0}  # for those that leave


WRONG: list[tuple[int, bytes]] = [
    (400, b'{"prompt": "And", "temperature": -1}'),
    (400, b'{"prompt": "And", "stream": true, "best_of": 3}'),
    (400, b'{"prompt": ["And", 5]}'),
    (400, b'{"prompt": "And"'),
    (404, b'{"prompt": "And", "model": "another"}'),
]


Choices = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Call:
    """One caller's request, and what becomes of it."""

    sent: bytes
    options: dict[str, Any]
    status: int = 200
    leaves_after: float | None = None  # seconds, before there is an answer
    leaves_at: int | None = None  # an event, within the answer

    @property
    def stays(self) -> bool:
        return self.leaves_after is None and self.leaves_at is None


def mixed(count: int) -> list[Call]:
    """A tenth leaves, a twentieth is wrong, half of the others stream."""
    rng = random.Random(count)
    calls = [_wrong(rng) for _ in range(count // 20)]
    calls += [_leaving(rng) for _ in range(count // 10)]
    calls += [_staying(rng, at) for at in range(count - len(calls))]
    rng.shuffle(calls)
    return calls


def _wrong(rng: random.Random) -> Call:
    status, sent = rng.choice(WRONG)
    return Call(sent, {}, status)


def _leaving(rng: random.Random) -> Call:
    options = {"prompt": _prompt(rng), "seed": rng.getrandbits(64), **LONG}
    if rng.random() < 0.5:
        options["stream"] = rng.random() < 0.5
        return call_of(options, leaves_after=rng.random() ** 2)
    return call_of({**options, "stream": True}, leaves_at=rng.randrange(1, 60))


def _staying(rng: random.Random, at: int) -> Call:
    options: dict[str, Any] = {
        "prompt": [_text(rng), _text(rng)] if rng.random() < 0.1 else _prompt(rng),
        "max_tokens": rng.randrange(1, 24),
        "seed": rng.getrandbits(64),
        "temperature": rng.choice([0, 0.7, 1]),
        "top_p": rng.choice([0.9, 1]),
        "stream": at % 2 == 0,
    }
    if rng.random() < 0.3:
        options["n"] = rng.randrange(2, 4)
    elif not options["stream"] and rng.random() < 0.2:
        options |= {"n": 2, "best_of": 3}
    if rng.random() < 0.3:
        options["logprobs"] = rng.randrange(3)
    if rng.random() < 0.2:
        options["stop"] = rng.choice([",", ["the", "LORD"]])
    return call_of(options)


def call_of(options: dict[str, Any], **fate: Any) -> Call:
    return Call(json.dumps(options).encode(), options, **fate)


def _prompt(rng: random.Random) -> Any:
    if rng.random() < 0.3:
        return [rng.randrange(1, 4096) for _ in range(rng.randrange(1, 40))]
    return _text(rng)


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(TEXT.split(), k=rng.randrange(1, 40)))


def alone(model: fastgen.Generator, call: Call) -> Choices:
    """What the request has when nobody else asks for anything."""
    options = dict(call.options)
    prompts = options.pop("prompt")
    options["max_new_tokens"] = options.pop("max_tokens")
    del options["stream"]
    return [
        (at * options.get("n", 1) + place, c.text, c.finish_reason,
         None if c.logprobs is None else [own.logprob for own in c.logprobs])
        for at, generation in enumerate(model.generate(prompts, SamplingParams(**options)))
        for place, c in enumerate(generation.completions)
    ]  # fmt: skip


async def answer_of(server: RunningServer, call: Call) -> Choices | None:
    """The choices that came; None for those that left and those that are wrong."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        head = f"content-length: {len(call.sent)}\r\nhost: x\r\nconnection: close\r\n\r\n"
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + call.sent)
        if call.leaves_after is not None:
            await asyncio.sleep(call.leaves_after)
            return None
        if call.leaves_at is not None:
            for _ in range(call.leaves_at):
                assert b'"error"' not in await reader.readuntil(b"}\n\n")
            return None
        head, _, payload = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    assert head.startswith(f"HTTP/1.1 {call.status} "), (head, payload)
    if call.status != 200:
        assert json.loads(payload)["error"]["message"]
        return None
    if call.options["stream"]:
        assert "chunked" in head
        return joined(without_chunks(payload))
    return [choice_of(choice) for choice in json.loads(payload)["choices"]]


def without_chunks(payload: str) -> str:
    lines = payload.split("\r\n")
    assert lines[-3:] == ["0", "", ""]
    return "".join(lines[1:-3:2])


def joined(text: str) -> Choices:
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    parts: dict[int, list[Any]] = defaultdict(list)
    for event in events:
        [choice] = json.loads(event.removeprefix("data: "))["choices"]
        assert not parts[choice["index"]] or parts[choice["index"]][-1][2] is None
        parts[choice["index"]].append(choice_of(choice))
    return [
        (index, "".join(part[1] for part in own), own[-1][2],
         None if own[0][3] is None else [logprob for part in own for logprob in part[3]])
        for index, own in sorted(parts.items())
    ]  # fmt: skip


def choice_of(choice: dict[str, Any]) -> tuple[Any, ...]:
    logprobs = choice["logprobs"]
    return (choice["index"], choice["text"], choice["finish_reason"],
            None if logprobs is None else logprobs["token_logprobs"])  # fmt: skip


async def all_of(server: RunningServer, calls: Sequence[Call]) -> list[Choices | None]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(call: Call) -> Choices | None:
        async with room:
            return await answer_of(server, call)

    return await asyncio.wait_for(asyncio.gather(*map(one, calls)), 500)


def settle(server: RunningServer, model: fastgen.Generator) -> tuple[int, int, float]:
    """When all is over: threads, open files, and resident MB."""
    wait_until(lambda: not model.engine.num_unfinished)
    assert_idle(model.engine)
    wait_until(lambda: not server.server.server_state.connections)
    wait_until(lambda: not server.server.server_state.tasks)
    assert not listeners_of(server.service.models[MODEL].engine)
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return threading.active_count(), files, resident * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(model: fastgen.Generator, count: int, most_growth: float) -> None:
    calls = mixed(count)
    fates = Counter((call.stays, call.status) for call in calls)
    assert fates[False, 200] == count // 10 and fates[True, 200] == count - 3 * (count // 20)
    wanted = [alone(model, call) if call.stays and call.options else None for call in calls]
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with serving({MODEL: model}) as server:
        found, left = [], []
        for begin in range(0, count, count // 4):
            found += asyncio.run(all_of(server, calls[begin : begin + count // 4]))
            left.append(settle(server, model))
        counts = metrics(server)
    assert found == wanted
    sums = {key[-1]: counts[key] for key in counts if key[0] == "fastgen_requests_total"}
    assert sums.keys() <= {"200", "400", "404", "499", "0"}  # the last two: it had left
    assert sums["400"] == fates[True, 400] and sums["404"] == fates[True, 404]
    assert fates[True, 200] <= sums["200"] and sum(sums.values()) <= count
    assert left[1][:2] == left[3][:2], "threads or files have come to stay"
    assert left[3][2] - left[1][2] < most_growth, left
    assert threading.active_count() == threads
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def metrics(server: RunningServer) -> dict[tuple[str, ...], float]:
    """By their name and labels, the model's left out; 0 where there is none yet."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (value for name, value in sample.labels.items() if name != "model")
            found[(sample.name, *labels)] = sample.value
    return found
