"""The server's tests, over and over, for as long as one likes; one line of JSON in the end.

    make soak MINUTES=10

Waves of mixed requests against a server in this process: every answer has to be what the request
has alone. Between them, servers in processes of their own that are told to end, or killed, with
streams under way. Ends with 1 if anything was lost, wrong, or left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from contextlib import closing
from typing import Any

import fastgen
from raw_client import CANARY, LONG, answer, begun, everything, post
from server_harness import MODEL, ServerProcess, serving
from server_load import all_of, alone, mixed, settle

WAVE = 200  # requests
STREAMS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    started = time.monotonic()
    counts = {
        "requests": 0,
        "wrong": 0,
        "terms": 0,
        "kills": 0,
        "cut_off": 0,
        "bad_exits": 0,
    }
    resident: list[float] = []
    with (
        fastgen.load(max_batch_size=8, max_seq_len=512) as model,
        serving({MODEL: model}) as server,
    ):
        while not resident or time.monotonic() - started < 60 * minutes:
            calls = mixed(WAVE + len(resident))  # other ones each time
            wanted = [alone(model, call) if call.stays and call.options else None for call in calls]
            found = asyncio.run(all_of(server, calls))
            counts["requests"] += len(calls)
            counts["wrong"] += sum(a != b for a, b in zip(found, wanted, strict=True))
            threads, files, megabytes = settle(server, model)
            resident.append(megabytes)
            _end_a_process(counts, kill=len(resident) % 4 == 0)
            print(f"{len(resident)} waves, {megabytes:.0f} MB", file=sys.stderr, flush=True)
    quarter = resident[len(resident) // 4]
    record: dict[str, Any] = {
        **counts,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "waves": len(resident),
        "resident_mb": round(resident[-1], 1),
        "growth_percent": round(100 * (resident[-1] / quarter - 1), 2),
        "threads": threads,
        "files": files,
    }
    print(json.dumps(record))
    sys.exit(any(counts[name] for name in ("wrong", "cut_off", "bad_exits")))


def _end_a_process(counts: dict[str, int], *, kill: bool) -> None:
    """With streams under way: SIGTERM gives each its end; after SIGKILL the port serves again."""
    with ServerProcess("--drain-timeout", "0.2") as server:
        port = int(server.wait_until_ready().rpartition(":")[2])
        clients = [begun(port, post({**LONG, "stream": True})) for _ in range(STREAMS)]
        for client in clients:
            client.recv(1)  # its stream has begun
        server.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        for client in clients:
            with closing(client):
                counts["cut_off"] += not (kill or b"data: [DONE]" in everything(client))
        counts["bad_exits"] += server.wait() != (-signal.SIGKILL if kill else 0)
    counts["kills" if kill else "terms"] += 1
    if kill:
        with ServerProcess("--port", str(port)) as server:
            server.wait_until_ready()
            counts["wrong"] += answer(port, post(CANARY)).status != 200
            server.terminate()
            counts["bad_exits"] += server.wait() != 0


if __name__ == "__main__":
    main()
