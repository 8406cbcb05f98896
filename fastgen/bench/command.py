"""`fastgen bench`: its options, its progress, and what it prints."""

from __future__ import annotations

import argparse
import ast
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.bench.measure import Work
from fastgen.bench.peer_process import INSTALL
from fastgen.bench.run import Run, measure
from fastgen.bench.shapes import SHAPES, save_checkpoint
from fastgen.decoders.plan import LoadOptions
from fastgen.sampling.options import FILTERS
from fastgen.sampling.params import SamplingParams
from fastgen.speculation.choose import check_choice

PEERS = tuple(name for name in INSTALL if name != "fastgen")
_SAMPLING = (
    *(option.name for option in FILTERS),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("no_repeat_ngram_size", "logprobs"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="PATH", help="folder or hub id")
    which.add_argument("--shape", choices=SHAPES, default="gpt2",
        help="random weights of this size (default: gpt2)")  # fmt: skip
    add("--threads", type=positive, metavar="N", help="CPU threads (default: all granted)")
    add("--max-memory", type=positive, metavar="MB", help="for weights, KV cache and scratch")
    add("--batch-sizes", type=sizes, default="1,8,32", metavar="N,N,...",
        help="rows that run together (default: 1,8,32)")  # fmt: skip
    add("--prompt-len", type=positive, default=32, metavar="N",
        help="tokens of each prompt, random and new each time (default: 32)")  # fmt: skip
    add("--output-len", type=positive, default=96, metavar="N",
        help="tokens that each prompt is continued by (default: 96)")  # fmt: skip
    add("--sampling", type=sampling, default="temperature=0", metavar="NAME=VALUE,...",
        help='like "temperature=0.8,top_p=0.95" (default: temperature=0, greedy)')  # fmt: skip
    add("--speculate", metavar="KIND",
        help="auto, suffix or off; on, texts that repeat themselves come faster than others "
        "(default: off, with --draft-model auto)")  # fmt: skip
    add("--draft-model", metavar="PATH", help="a smaller model that guesses tokens")
    add("--rounds", type=positive, default=5, metavar="N",
        help="how often each is measured, interleaved (default: 5)")  # fmt: skip
    add("--compare", type=peers, nargs="?", const=PEERS, metavar="PEER,PEER",
        help=f"next to other engines, those that are installed: {', '.join(PEERS)}")  # fmt: skip
    add("--python", type=interpreter, action="append", default=[], metavar="PEER=PATH",
        help="the interpreter that has a peer (default: this one); may be repeated")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png", help="draw throughput and latencies")
    add("--allow-fallback", action="store_true",
        help="report also where fastgen does not run as fast as it could")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print tables and, as the last line, JSON."""
    try:
        from rich.console import Console

        from fastgen.bench.table import show

        if arguments.plot is not None:
            from fastgen.bench.plot import check_path, save_plot

            check_path(arguments.plot)
    except ModuleNotFoundError as error:
        message = f"fastgen bench needs {error.name}: pip install 'fastgen[bench]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="fastgen-bench-") as name:
        work = _run_of(arguments, Path(name))
        with _progress(work.num_stages) as progress:
            if arguments.model is None:
                progress(f"making random weights of {arguments.shape}'s size")
                save_checkpoint(Path(work.model), SHAPES[arguments.shape])
            record = measure(work, progress)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    line = json.dumps(record, allow_nan=False)
    show(record, console)
    try:
        if arguments.plot is not None:
            save_plot(record, arguments.plot)
    finally:  # also if it could not be drawn
        print(line)
    return 0


def _run_of(arguments: argparse.Namespace, scratch: Path) -> Run:
    params = SamplingParams(
        max_new_tokens=arguments.output_len, ignore_eos=True, **arguments.sampling
    )
    if arguments.python and not arguments.compare:
        raise ValueError("--python says where peers of --compare are")
    if arguments.compare is not None and arguments.sampling != {"temperature": 0}:
        raise ValueError("--compare is greedy: leave --sampling out")
    speculate = arguments.speculate or ("off" if arguments.draft_model is None else "auto")
    check_choice(speculate, has_draft_model=arguments.draft_model is not None)
    if arguments.compare is not None and speculate != "off":
        raise ValueError(
            "--compare decodes one token a step: leave --speculate and --draft-model out"
        )
    return Run(
        model=arguments.model or str(scratch / "checkpoint"),
        name=arguments.model or f"{arguments.shape} (random weights)",
        is_plain=arguments.model is None,
        options=LoadOptions(
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            kv_dtype=arguments.kv_dtype,
            decoder=arguments.decoder,
            max_batch_size=max(arguments.batch_sizes),
            max_seq_len=arguments.prompt_len + arguments.output_len,
            max_memory=arguments.max_memory,
            num_threads=arguments.threads,
        ),
        work=Work(arguments.prompt_len, arguments.output_len, params),
        batches=arguments.batch_sizes,
        rounds=arguments.rounds,
        sampling=", ".join(f"{name}={value}" for name, value in arguments.sampling.items()),
        peers=arguments.compare,
        pythons=dict(arguments.python),
        scratch=scratch,
        speculate=speculate,
        draft_model=arguments.draft_model,
        revision=arguments.revision,
        allow_fallback=arguments.allow_fallback,
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this as Ctrl-C does: no process and no temporary checkpoint is left."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """On standard error: a bar on a terminal, else a line for each stage."""
    if not sys.stderr.isatty():
        yield lambda told: print(f"fastgen bench: {told}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total + 1, completed=-1)
        yield lambda told: bar.update(task, advance=1, description=told)


def positive(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def sizes(text: str) -> list[int]:
    """Ascending, each once."""
    return sorted({positive(each) for each in text.split(",")})


def sampling(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in _SAMPLING:
            known = ", ".join(_SAMPLING)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=NUMBER") from None
    return found


def peers(text: str) -> tuple[str, ...]:
    found = tuple(filter(None, text.split(",")))
    if not found:
        raise argparse.ArgumentTypeError(f"name some of {', '.join(PEERS)}, or none at all")
    for name in found:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PEERS)}")
    return found


def interpreter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PATH, of {', '.join(PEERS)}")
    return name, path
