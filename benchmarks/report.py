"""Tables of the dated runs (dated_run.py), written between marks into the PAGES below; and README's
plot, results/speed.png. processor_tables.py has the runs of all processors, subject_tables.py and
speculation_tables.py those of other records.

python benchmarks/report.py            # write them between their marks
python benchmarks/report.py --check    # fail if that would change a page or the plot
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import speed_plot
from cells import PEERS, judged, markdown, pair, percent, processor
from dated_run import CONTEXTS
from harness import RESULTS
from models import PRECISIONS
from processor_tables import plots, processors, record_of, shown
from speculation_tables import (
    speculation,
    speculation_draft,
    speculation_oracle,
    speculation_peers,
)
from speed_plot import Speed
from subject_tables import dropin, second_processor

from fastgen.bench import roofline
from fastgen.bench.shapes import SHAPES, Precision, weight_bytes

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "speculation.md",
    ROOT / "docs" / "transformers.md",
)
PLOT = RESULTS / "speed.png"
# Wanted at batch 1, 8, 32: of the limit of decode steps, and over the best peer.
SHARES = {"float32": (90, 70, 70), "bfloat16": (90, 65, 65), "int8": (80, 60, 60)}
FASTER = {"float32": (1.0, 1.3, 1.3), "bfloat16": (1.0, 1.3, 1.2), "int8": (1.3, 2.0, 1.5)}
TORCH_FASTER = {"float32": 1.15, "bfloat16": 1.5}  # at batch 1; never slower
KINDS = {
    "float32": Precision(4, 4, "float32", "float32"),
    "bfloat16": Precision(2, 2, "bfloat16", "bfloat16"),
    "int8": Precision(1, 2, "int8", "bfloat16"),
}
GPT2 = SHAPES["gpt2"]

Record = dict[str, Any]


def run(name: str) -> Record:
    return record_of(shown(), name)


def machine() -> str:
    """In a sentence, with the limits that each run saw."""
    records = [run(name) for name in PRECISIONS]
    about = records[0]["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in about["caches"].items())
    lines = [
        f"{about['date']}, commit {about['commit']}. {about['cpu']}, {about['cores']} cores "
        f"granted ({caches}; {', '.join(about['features'])}), {about['memory_gb']} GB, "
        f"{about['system']}, Python {about['python']}, NumPy {about['numpy']}, torch "
        f"{about['torch']}.",
        "",
        "",
    ]
    rows = [
        (name, limit, f"{peak['median']:.1f} {peak['unit']}",
         f"{peak['lowest']:.1f} to {peak['highest']:.1f}", peak["how"])
        for name, record in zip(PRECISIONS, records, strict=True)
        for limit, peak in record["limits"].items()
    ]  # fmt: skip
    return "\n".join(lines) + markdown(("run", "limit", "median", "within the run", "how"), rows)


def speed() -> str:
    """README's table: against the fastest other engine, and against transformers."""
    head = ("", "batch", "tokens/s", "fastest other engine", "its tokens/s",
            "times as fast", "times transformers")  # fmt: skip
    rows = [
        (each.precision, each.batch, f"{each.fastgen:,.0f}", each.best_name, f"{each.best:,.0f}",
         f"{each.times_best:.2f}", "" if each.times_plain is None else f"{each.times_plain:.2f}")
        for each in speeds()
    ]  # fmt: skip
    others = "; ".join(engines_run().values())
    return f"{setting()}:\n\n{markdown(head, rows)}\n\nOther engines: {others}."


def speeds() -> list[Speed]:
    """Of the runs with peers; the fastest peer is that over which fastgen's lead is least."""
    found = []
    for name in PRECISIONS:
        record = run(name)
        for row in record["results"]:
            batch = row["batch_size"]
            engines = compared(record, batch)
            own = engines.pop("fastgen")
            peer = min(engines, key=lambda each: engines[each]["fastgen_is_faster"]["median"])
            plain = engines.get("transformers")
            found.append(Speed(
                name, batch, own["tokens_per_s"], PEERS[peer], engines[peer]["tokens_per_s"],
                engines[peer]["fastgen_is_faster"]["median"],
                None if plain is None else plain["tokens_per_s"],
                None if plain is None else plain["fastgen_is_faster"]["median"],
            ))  # fmt: skip
    return found


def engines_run() -> dict[str, str]:
    """The names of the other engines that were timed in some precision."""
    timed = {row["peer"] for name in PRECISIONS for row in run(name)["comparison"]["results"]}
    return {peer: name for peer, name in PEERS.items() if peer in timed}


def compared(record: Record, batch: int) -> dict[str, Record]:
    """Results of the engines that took turns, by name."""
    rows = record["comparison"]["results"]
    return {row["peer"]: row for row in rows if row["batch_size"] == batch}


def setting() -> str:
    """What was run, where and when, in a line."""
    record = run("float32")
    work, about = record["work"], record["machine"]
    return (
        f"GPT-2 124M, prompts of {work['prompt_len']} tokens, {work['output_len']} new tokens, "
        f"greedy; {processor(about)}"
    )


def results() -> str:
    head = ("", "batch", "TTFT p50 / p99", "TPOT p50 / p99", "ITL p50 / p99", "tokens/s",
            "limit", "share", "of prefill", "of decode", "wanted of decode")  # fmt: skip
    rows = []
    for name in PRECISIONS:
        for row, wanted in zip(run(name)["results"], SHARES[name], strict=True):
            decode = 100 * row["decode_share"]["median"]
            rows.append((
                name, row["batch_size"], *(pair(row[kind]) for kind in ("ttft_ms", "tpot_ms",
                "itl_ms")), f"{row['tokens_per_s']:,.0f}", f"{row['limit_tokens_per_s']:,.0f}",
                f"{percent(row['share'])} %", f"{percent(row['prefill_share'])} %",
                f"{decode:.0f} %", judged(decode, wanted, f"{wanted} %"),
            ))  # fmt: skip
    return markdown(head, rows)


def loading() -> str:
    head = ("", "load", "memory at most", "planned")
    rows = []
    for name in PRECISIONS:
        record = run(name)
        memory = record["memory"]
        rows.append((name, f"{record['load_seconds']:.2f} s", f"{memory['peak_mb']:,} MB",
                     f"{memory['planned_mb']:,} MB"))  # fmt: skip
    return markdown(head, rows)


def peers() -> str:
    """How many times as fast fastgen is; the best peer decides whether a target is met."""
    engines = engines_run()
    head = ("", "batch", "fastgen tokens/s", *engines.values(), "wanted over the best")
    rows = []
    for name in PRECISIONS:
        for index, batch in enumerate((1, 8, 32)):
            found = compared(run(name), batch)
            faster = {peer: found[peer]["fastgen_is_faster"]["median"] for peer in engines
                      if peer in found}  # fmt: skip
            wanted, missing = FASTER[name][index], _missing(name)
            without = f" (without {', '.join(missing)})" if missing else ""
            rows.append((
                name, batch, f"{found['fastgen']['tokens_per_s']:,.0f}",
                *(f"{faster[peer]:.2f}" if peer in faster else "-" for peer in engines),
                judged(min(faster.values()), wanted, f"{wanted:g}") + without,
            ))  # fmt: skip
    return markdown(head, rows)


def _missing(name: str) -> list[str]:
    """Peers that have this precision and were not timed: the best may be among them."""
    states = run(name)["comparison"]["peers"]
    return [
        PEERS[peer]
        for peer, state in states.items()
        if not state.get("why_not", "has no").startswith("has no")
    ]


def peers_checked() -> str:
    """What was said of each peer: version, tokens, or why it is not there."""
    lines = []
    for name in PRECISIONS:
        for peer, state in run(name)["comparison"]["peers"].items():
            if "why_not" in state:
                lines.append(f"- {name}, {peer}: {state['why_not']}")
            elif peer != "fastgen" and name == "float32":  # the others are checked in float32, too
                parted = state["parted_within_nats"]
                lines.append(
                    f"- {peer} {state['version']}: loads in {state['load_seconds']:.1f} s; "
                    f"{state['tokens_agree']:.0%} of the float32 tokens are fastgen's"
                    + (f", rows parted where two were within {parted:g} nats" if parted else "")
                )
    return "\n".join(lines)


def torch_decoder() -> str:
    head = ("", "batch", "tokens/s", "share of decode", "times transformers", "wanted")
    rows = []
    for name, wanted in TORCH_FASTER.items():
        record = run(f"torch_{name}")
        faster = {
            row["batch_size"]: row["fastgen_is_faster"]["median"]
            for row in record["comparison"]["results"]
            if row["peer"] == "transformers"
        }
        for row in record["results"]:
            batch, least = row["batch_size"], wanted if row["batch_size"] == 1 else 1.0
            rows.append((name, batch, f"{row['tokens_per_s']:,.0f}",
                         f"{percent(row['decode_share'])} %", f"{faster[batch]:.2f}",
                         judged(faster[batch], least, f"{least:g}")))  # fmt: skip
    return markdown(head, rows)


def bytes_and_operations() -> str:
    """Of one decode step at batch 1, and of each further row, by size of the model."""
    head = ("", "", "weights read a step", "KV read a row and token of context",
            "multiply-adds a row", "more for each token of context")  # fmt: skip
    rows = []
    for shape_name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        shape = SHAPES[shape_name]
        for name, kind in KINDS.items():
            rows.append((shape_name, name, f"{weight_bytes(shape, kind) / 1e6:,.0f} MB",
                         f"{shape.context * kind.kv_bytes / 1e3:,.1f} KB",
                         f"{(shape.linear + shape.head) / 1e6:,.0f} M",
                         f"{shape.context / 1e3:,.1f} K"))  # fmt: skip
    return markdown(head, rows)


def turning_points() -> str:
    """From which batch on arithmetic is the limit, at the dated run's peaks and contexts of 80."""
    rows = []
    for name, kind in KINDS.items():
        limits = run(name)["limits"]
        speeds = roofline.Speeds(
            *(1e9 * limits[each]["median"] for each in ("read", kind.linear_peak,
              kind.attention_peak))
        )  # fmt: skip
        steps = {batch: roofline.decode_step(GPT2, kind, batch, 80) for batch in range(1, 257)}
        first = next(
            (str(batch) for batch, step in steps.items()
             if step.computing(speeds) > step.reading(speeds)), "over 256",
        )  # fmt: skip
        rows.append((name, f"{limits['read']['median']:.1f} GB/s",
                     f"{limits[kind.linear_peak]['median']:,.0f} G/s", first))  # fmt: skip
    return markdown(("", "read", "multiply-adds", "arithmetic bounds from batch"), rows)


def contexts() -> str:
    """Decode steps by context: measured, against the limit."""
    head = ("", "batch", *(f"context {context + 16}" for context in CONTEXTS))
    rows = []
    for name in PRECISIONS:
        for batch in (1, 8):
            cells = []
            for context in CONTEXTS:
                row = batch_of(run(f"context_{context}_{name}"), batch)
                cells.append(f"{step_ms(row):.2f} ms, {percent(row['decode_share'])} %")
            rows.append((name, batch, *cells))
    return markdown(head, rows)


def where() -> str:
    """A line through the steps' times over the context: what does not depend on it is matrices and
    all else; what does is attention."""
    head = ("", "batch", "without context", "its limit", "each 100 tokens of context", "its limit")
    rows = []
    for name, kind in KINDS.items():
        records = {context: run(f"context_{context}_{name}") for context in CONTEXTS}
        for batch in (1, 8):
            taken = [step_ms(batch_of(record, batch)) for record in records.values()]
            middle = [context + 16 for context in CONTEXTS]
            slope, fixed = np.polyfit(middle, taken, 1)
            read, linear = (
                np.median([record["limits"][limit]["median"] for record in records.values()])
                for limit in ("read", kind.linear_peak)
            )
            matrices = GPT2.linear + GPT2.head
            least = max(matrices * kind.weight_bytes / read / 1e6, batch * matrices / linear / 1e6)
            per_token = batch * GPT2.context * kind.kv_bytes / read / 1e6
            rows.append((name, batch, f"{fixed:.2f} ms", f"{least:.2f} ms",
                         f"{100 * slope:.3f} ms", f"{100 * per_token:.3f} ms"))  # fmt: skip
    return markdown(head, rows)


def prompts() -> str:
    """Prefill by length of the prompt, batch 1."""
    head = ("", *(f"{context} tokens" for context in CONTEXTS))
    rows = []
    for name in PRECISIONS:
        found = [batch_of(run(f"context_{context}_{name}"), 1) for context in CONTEXTS]
        rows.append((name, *(f"{row['ttft_ms']['p50']:,.0f} ms, {percent(row['prefill_share'])} %"
                             for row in found)))  # fmt: skip
    return markdown(head, rows)


def threads() -> str:
    head = ("", "batch", "1 thread", "2 threads", "times as fast")
    rows = []
    for name in PRECISIONS:
        one, two = run(f"threads_1_{name}")["results"], run(name)["results"]
        for single, double in zip(one, two, strict=True):
            faster = double["decode_tokens_per_s"] / single["decode_tokens_per_s"]
            cells = [f"{row['decode_tokens_per_s']:,.0f} tokens/s, {percent(row['decode_share'])} %"
                     for row in (single, double)]  # fmt: skip
            rows.append((name, single["batch_size"], *cells, f"{faster:.2f}"))
    return markdown(head, rows)


def batch_of(record: Record, batch: int) -> Record:
    [found] = [row for row in record["results"] if row["batch_size"] == batch]
    return dict(found)


def step_ms(row: Record) -> float:
    """Of a decode step, in which each of the rows gets a token."""
    return float(1e3 * row["batch_size"] / row["decode_tokens_per_s"])


TABLES: dict[str, Callable[[], str]] = {
    each.__name__.replace("_", "-"): each
    for each in (speed, machine, results, loading, peers, peers_checked, torch_decoder,
                 bytes_and_operations, turning_points, contexts, where, prompts, threads, plots,
                 processors, dropin, second_processor, speculation, speculation_oracle,
                 speculation_draft, speculation_peers)
}  # fmt: skip


def filled(page: str) -> str:
    """The page, with each table between its marks."""

    def table(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        return f"{start}\n{TABLES[name]()}\n{end}"

    return re.sub(r"(<!-- (\S+) -->)\n(.*?)(<!-- end -->)", table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    options = parser.parse_args()
    for path in PAGES:
        page = path.read_text()
        new = filled(page)
        if not options.check:
            path.write_text(new)
        elif new != page:
            raise SystemExit(f"{path.name} is not what report.py makes of results/runs")
    if not speed_plot.shows(speeds(), setting(), PLOT):
        if options.check:
            raise SystemExit(f"{PLOT.name} is not what report.py makes of results/runs")
        speed_plot.save(speeds(), setting(), PLOT)


if __name__ == "__main__":
    main()
