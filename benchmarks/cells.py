"""How numbers stand in the published tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PEERS = {
    "transformers": "transformers",
    "transformers_static": "transformers, static cache, compiled",
    "ctranslate2": "CTranslate2",
    "llama_cpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "onnxruntime": "ONNX Runtime",
}
_VECTORS = {"avx512f": " with AVX-512", "avx2": " with AVX2"}


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def judged(value: float, wanted: float, told: str) -> str:
    """`told`, and whether the target was missed."""
    return told if value >= wanted else f"{told}: **missed**"


def percent(share: dict[str, float]) -> int:
    """Of a share's median."""
    return round(100 * share["median"])


def pair(values: dict[str, float] | None) -> str:
    """p50 and p99."""
    return "-" if values is None else f"{values['p50']:,.1f} / {values['p99']:,.1f}"


def processor(machine: dict[str, Any]) -> str:
    """Processor, its widest vectors where the record has them, cores and date."""
    features = machine.get("features", ())
    widest = next((name for key, name in _VECTORS.items() if key in features), "")
    name = machine["cpu"].replace("(R)", "") + widest
    return f"{name}, {machine['cores']} cores, {machine['date']}"
