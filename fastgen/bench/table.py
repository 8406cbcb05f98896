"""A run as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]


def show(record: Record, console: Console) -> None:
    """The whole record, for people."""
    for line in _head(record):
        console.print(Text(line))
    console.print(_results(record))
    if record["comparison"] is not None:
        console.print(_comparison(record))
        for peer, state in record["comparison"]["peers"].items():
            if told := _told(state):
                console.print(Text(f"{peer} {told}"))
    for name, style in (("fallbacks", "bold red"), ("notes", "yellow")):
        for line in record[name]:
            console.print(Text(line, style=style))


def _head(record: Record) -> list[str]:
    machine, model, decoder = record["machine"], record["model"], record["decoder"]
    work, memory = record["work"], record["memory"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    where = machine["cpu"] if decoder["device"] == "cpu" else decoder["device_name"]
    threads = f", {decoder['num_threads']} threads" if decoder["num_threads"] else ""
    limits = ", ".join(
        f"{name} {peak['median']:.1f} {peak['unit']} ({peak['lowest']:.1f} to "
        f"{peak['highest']:.1f}, {peak['how']})"
        for name, peak in record["limits"].items()
    )
    found = record["speculation"]
    guessed = (
        []
        if found is None
        else [
            f"guessed  {found['accepted_tokens']:,} of {found['drafted_tokens']:,} drafted tokens "
            f"were right; {found['speculated_steps']:,} of {found['steps']:,} steps had drafts"
        ]
    )
    measured = "unknown" if memory["peak_mb"] is None else f"{memory['peak_mb']:,} MB"
    return [
        f"machine  {where}, {machine['cores']} cores granted ({caches})",
        f"model    {model['name']}, {model['parameters']:,} parameters",
        f"decoder  {decoder['decoder']} ({decoder['reason']}), {decoder['dtype']}, weights "
        f"{decoder['weights']}{threads}",
        f"work     {work['prompt_len']} prompt tokens, {work['output_len']} new ones, "
        f"{work['sampling']}; {work['rounds']} rounds",
        f"limits   {limits or 'cannot be measured here'}",
        f"load     {record['load_seconds']:.2f} s; memory at most {measured}, "
        f"{memory['planned_mb']:,} MB planned",
        *guessed,
    ]


def _results(record: Record) -> Table:
    table = Table(title="TTFT, TPOT, ITL in milliseconds, p50 / p99")
    columns = ("batch", "TTFT", "TPOT", "ITL", "tokens/s", "limit", "share", "prefill", "decode")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("decode bound by")
    for row in record["results"]:
        limit = row["limit_tokens_per_s"]
        table.add_row(
            str(row["batch_size"]),
            *(_pair(row[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms")),
            f"{row['tokens_per_s']:,.1f}",
            "-" if limit is None else f"{limit:,.1f}",
            *(_share(row[name]) for name in ("share", "prefill_share", "decode_share")),
            row["decode_bound"] or "-",
        )
    return table


def _comparison(record: Record) -> Table:
    comparison = record["comparison"]
    table = Table(title=f"in turns with other engines, {comparison['precision']}, greedy")
    table.add_column("batch", justify="right")
    table.add_column("engine")
    for name in ("tokens/s", "fastgen is faster", "lowest to highest", "memory", "same tokens"):
        table.add_column(name, justify="right")
    last = None
    for row in comparison["results"]:
        if last not in (None, row["batch_size"]):
            table.add_section()
        last = row["batch_size"]
        faster = row["fastgen_is_faster"]
        table.add_row(
            str(row["batch_size"]),
            row["peer"],
            f"{row['tokens_per_s']:,.1f}",
            f"{faster['median']:.2f} x",
            f"{faster['lowest']:.2f} to {faster['highest']:.2f}",
            "-" if row["peak_mb"] is None else f"{row['peak_mb']:,} MB",
            f"{row['tokens_agree']:.0%}",
        )
    return table


def _told(state: Record) -> str | None:
    if "why_not" in state:
        return str(state["why_not"])
    if "tokens_agree" not in state:
        return None
    parted = state["parted_within_nats"]
    told = f"{state['version']}: float32 tokens checked, {state['tokens_agree']:.0%} the same"
    return told + (f", parted where two were within {parted:g} nats" if parted else "")


def _pair(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['p50']:,.1f} / {values['p99']:,.1f}"


def _share(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['median']:.0%}"
