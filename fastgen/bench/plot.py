"""A run as a picture: throughput against batch under the roofline, and latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]


def save_plot(record: Record, path: Path) -> None:
    """Write it, in the format that the file's name says.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        throughput, latency = figure.subplots(1, 2)
        _throughput(throughput, record)
        _latency(latency, record)
        figure.suptitle(_title(record), fontsize=9)
        figure.savefig(path, dpi=130)


def check_path(path: Path) -> None:
    """Raise ValueError now for what save_plot could not write later."""
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join(sorted(known))}")


def _throughput(axes: Axes, record: Record) -> None:
    rows = record["results"]
    batches = [row["batch_size"] for row in rows]
    if all(row["limit_tokens_per_s"] for row in rows):
        limits = [row["limit_tokens_per_s"] for row in rows]
        axes.plot(batches, limits, "k--", label="limit (roofline)")
        axes.fill_between(batches, limits, max(limits) * 2, color="k", alpha=0.06)
    axes.plot(batches, [row["tokens_per_s"] for row in rows], "o-", color="C0", label="fastgen")
    for row in rows:
        if row["share"]:
            told = f"{row['share']['median']:.0%}"
            at = (row["batch_size"], row["tokens_per_s"])
            axes.annotate(told, at, textcoords="offset points", xytext=(-4, 7), fontsize=8)
    for color, (peer, points) in enumerate(_peers(record).items(), start=1):
        axes.plot(*zip(*points, strict=True), ".:", color=f"C{color}", label=peer)
    _log_batches(axes, batches)
    axes.set(yscale="log", ylabel="new tokens a second", title="throughput, whole requests")
    _legend_below(axes)


def _latency(axes: Axes, record: Record) -> None:
    rows = record["results"]
    batches = [row["batch_size"] for row in rows]
    kinds = {"ttft_ms": "first token (TTFT)", "tpot_ms": "mean of a request's others (TPOT)",
             "itl_ms": "between two tokens (ITL)"}  # fmt: skip
    for color, (kind, label) in enumerate(kinds.items()):
        if all(row[kind] for row in rows):
            for name, line in (("p50", "o-"), ("p99", ".:")):
                values = [row[kind][name] for row in rows]
                axes.plot(batches, values, line, color=f"C{color}", label=f"{label}, {name}")
    _log_batches(axes, batches)
    axes.set(yscale="log", ylabel="milliseconds", title="latency")
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _log_batches(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("batch size")


def _peers(record: Record) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in (record["comparison"] or {"results": []})["results"]:
        if row["peer"] != "fastgen":
            found.setdefault(row["peer"], []).append((row["batch_size"], row["tokens_per_s"]))
    return found


def _title(record: Record) -> str:
    model, decoder, work = record["model"], record["decoder"], record["work"]
    return (
        f"{model['name']}, {decoder['decoder']} decoder, {decoder['dtype']}, weights "
        f"{decoder['weights']}; {work['prompt_len']} + {work['output_len']} tokens, "
        f"{work['sampling']}\n{record['machine']['cpu']}, {record['machine']['cores']} cores, "
        f"{record['machine']['date']}, fastgen {record['machine']['fastgen']}"
    )
