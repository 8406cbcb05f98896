"""Tables of the records that a script of one subject left in results/ (bench_*.json)."""

from __future__ import annotations

import json
from typing import Any

from cells import PEERS, markdown, processor
from harness import RESULTS


def dropin() -> str:
    """`generate` of the drop-in and of transformers (bench_dropin.py)."""
    record = _record("bench_dropin")
    rows = [
        (row["dtype"], row["case"], *(f"{row['tokens_per_second'][engine]:,.0f}"
         for engine in ("fastgen", "transformers")), f"{row['times_faster']:.2f}")
        for row in record["results"]
    ]  # fmt: skip
    head = ("", "generate", "fastgen tokens/s", "transformers tokens/s", "times as fast")
    work = f"prompts of {record['prompt']} tokens, {record['new']} new tokens"
    return f"{processor(record['machine'])}; GPT-2 124M, {work}:\n\n{markdown(head, rows)}"


def second_processor() -> str:
    """Decode steps alone (bench_cpu.py), and whole generations against peers, on an AMD."""
    steps, engines = _record("bench_cpu"), _record("bench_peers")
    rows = []
    for step in steps["rows"]:
        if (step["shape"], step["work"]) != ("124M", "decode") or step["size"] not in (1, 8, 32):
            continue
        peer, faster = _fastest(engines["rows"], step["dtype"], step["size"])
        rows.append((step["dtype"], step["size"], f"{step['tokens_per_s']:,.0f}",
                     f"{100 * step['share']:.0f} %", peer, f"{faster:.2f}"))  # fmt: skip
    head = ("", "batch", "decode tokens/s", "share of the limit", "fastest other engine",
            "times as fast")  # fmt: skip
    return f"{processor(steps['machine'])}; GPT-2 124M:\n\n{markdown(head, rows)}"


def _fastest(rows: list[dict[str, Any]], dtype: str, batch: int) -> tuple[str, float]:
    """The peer over which fastgen's lead is least."""
    found = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
    peers = [row for row in found if row["peer"] != "fastgen"]
    best = min(peers, key=lambda row: float(row["first_is_faster"]))
    return PEERS[best["peer"]], best["first_is_faster"]


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record
