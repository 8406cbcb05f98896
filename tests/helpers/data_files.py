"""The files in tests/data."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parents[1] / "data"
HELD_OUT = _DATA / "held_out.txt"  # text that the bundled model was not trained on
GREEDY_100 = _DATA / "greedy_100.txt"  # what it generates greedily: a prompt and 100 tokens
