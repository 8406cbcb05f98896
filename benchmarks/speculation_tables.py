"""Tables of bench_speculation.py's record, results/bench_speculation.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cells import judged, markdown, processor
from harness import RESULTS

PATH = RESULTS / "bench_speculation.json"
ENGINES = {
    "fastgen": "fastgen",
    "transformers_lookup 10": "transformers, 10 tokens",
    "llama_cpp_lookup 2": "llama.cpp, 2 tokens",
    "llama_cpp_lookup 10": "llama.cpp, 10 tokens",
}
TASKS = {
    "quoting": "quoting",
    "editing": "editing",
    "lists": "lists",
    "free": "free, greedy",
    "loops": "free, greedy, loops",
    "sampled": "free, sampled",
}

Record = dict[str, Any]


def speculation() -> str:
    """How many times as fast each task is by itself, and the machine."""
    record = _record()
    head = ("", "text", "repeats its prompt, itself", "right of the drafts", "tokens a step")
    rows = [
        (own[0]["dtype"], TASKS[own[0]["task"]], _repeats(own[0]), *_drafts(own[0]), *_faster(own))
        for own in _groups(record, "tasks", "dtype", "task")
    ]
    work = f"GPT-2 124M's shape, {record['new_tokens']} new tokens"
    return (
        f"{processor(record['machine'])}; {work}:\n\n{markdown((*head, *_batches(record)), rows)}"
    )


def speculation_oracle() -> str:
    """Drafts that are right with a given probability."""
    record = _record()
    head = ("", "each token right", "right of the drafts", "tokens a step")
    rows = [
        (own[0]["dtype"], own[0]["engine"].removeprefix("oracle "), *_drafts(own[0]), *_faster(own))
        for own in _groups(record, "oracle", "dtype", "engine")
    ]
    return markdown((*head, *_batches(record)), rows)


def speculation_draft() -> str:
    """124M's shape as the draft model of XL's."""
    record = _record()
    head = ("", "right of the drafts", "tokens a step")
    rows = [
        ("XL, int8", *_drafts(own[0]), *_faster(own))
        for own in _groups(record, "draft", "dtype", "engine")
    ]
    return markdown((*head, *_batches(record)), rows)


def speculation_peers() -> str:
    """Other engines' own speculation on the same requests, at batch 1."""
    rows, absent = [], []
    for row in _rows(_record(), "peers"):
        if "why_not" in row:
            absent.append(f"- {row['dtype']}, {row['engine']}: {row['why_not']}")
        else:
            rows.append((
                row["dtype"], TASKS[row["task"]], ENGINES[row["engine"]],
                f"{row['without']:,.0f}", f"{row['tokens_per_s']:,.0f}",
                f"{row['times_faster']['median']:.2f}", f"{row['same_rows']:.0%}",
            ))  # fmt: skip
    head = ("", "text", "engine", "tokens/s without", "with", "times as fast", "rows that stay")
    return "\n".join([markdown(head, rows), *(["", *absent] if absent else [])])


def _faster(rows: Sequence[Record]) -> list[str]:
    """For each batch size."""
    found = [(row["times_faster"]["median"], row["wanted"]) for row in rows]
    return [judged(faster, wanted, f"{faster:.2f}") for faster, wanted in found]


def _batches(record: Record) -> list[str]:
    sizes = dict.fromkeys(row["batch"] for row in record["rows"] if row["part"] != "peers")
    return [f"times as fast at batch {size}" for size in sizes]


def _drafts(row: Record) -> tuple[str, str]:
    share = row["acceptance"]
    return "-" if share is None else f"{share:.0%}", f"{row['tokens_per_step']:.2f}"


def _repeats(row: Record) -> str:
    return f"{row['repeats_prompt']:.0%}, {row['repeats_itself']:.0%}"


def _groups(record: Record, part: str, *keys: str) -> list[list[Record]]:
    """Rows of a part that differ in their batch size alone."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for row in _rows(record, part):
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def _rows(record: Record, part: str) -> list[Record]:
    return [row for row in record["rows"] if row["part"] == part]


def _record() -> Record:
    record: Record = json.loads(PATH.read_text())
    return record
