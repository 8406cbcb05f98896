"""Texts in tokens of bytes, and the pieces in which a sink hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fastgen.text.detokenizer import ByteLevelDecoder, TextSink

MANY_BYTES = [
    "你好，世界！",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👋🏽",
    "e\u0301 o\u0308\u0304 A\u030a \u0928\u093f \u1112\u1161\u11ab",
    "naïve Ωμέγα привет שלום مرحبا ไทย 𝔘𝔫𝔦",
]


def pieces_of(sink: TextSink, ids: Sequence[int]) -> list[str]:
    """What a reader that takes after every token gets."""
    pieces = []
    for token_id in ids:
        ended = sink.push(token_id)
        pieces.append(sink.take())
        if ended:
            break
    sink.finish()
    return [*pieces, sink.take()]


def sink_of_bytes(
    tokens: Sequence[bytes], stops: Sequence[str] = (), include_stop: bool = False
) -> TextSink:
    """A sink whose token i stands for `tokens[i]`."""
    return TextSink(ByteLevelDecoder(tokens.__getitem__), stops, include_stop=include_stop)


def cut(data: bytes, ends: Sequence[int]) -> list[bytes]:
    """`data` in pieces that end at `ends`."""
    edges = [0, *sorted(ends), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]
