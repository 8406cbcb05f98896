"""What the benchmarks of this folder run: the work by which decoding is judged, and how it is asked
for on a command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ["FASTGEN_CACHE"] = "off"  # weights are packed anew, unless a script says otherwise

PROMPT, NEW = 32, 96  # tokens of the work by which decoding is judged
PRECISIONS: dict[str, dict[str, Any]] = {  # options of fastgen.load
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}


def names(text: str) -> list[str]:
    """The names in "a,b"."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    """The numbers in "1,2"; none in ""."""
    return [int(name) for name in names(text)]


def add_choice(parser: argparse.ArgumentParser, option: str, default: str, known: Any) -> None:
    """An option that takes some of the known names, with commas between them."""

    def some(text: str) -> list[str]:
        unknown = [name for name in names(text) if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names(text)

    parser.add_argument(option, type=some, default=default, help=f"default: {default}")
