"""README's plot: fastgen, the fastest other engine and transformers, in tokens a second.

report.py gives it the numbers of its table. They are also written into the file, so that a test can
tell whether the plot is that of the records without drawing it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_WIDTH = 0.27  # of a bar; three of them make a group
_COLORS = {"fastgen": "#1f6fb4", "best": "#8a8a8a", "transformers": "#cfcfcf"}


class Speed(NamedTuple):
    """One line of README's table. Tokens a second of whole rounds; the best is another engine."""

    precision: str
    batch: int
    fastgen: float
    best_name: str
    best: float
    times_best: float
    transformers: float | None
    times_plain: float | None  # over transformers


def save(speeds: Sequence[Speed], title: str, path: Path) -> None:
    """Draw one panel for each batch size, and write it as a PNG."""
    batches = list(dict.fromkeys(speed.batch for speed in speeds))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.7), layout="constrained", facecolor="white")
        for axes, batch in zip(figure.subplots(1, len(batches)), batches, strict=True):
            _panel(axes, [speed for speed in speeds if speed.batch == batch])
            axes.set_title(f"batch {batch}", fontsize=10)
        figure.axes[0].set_ylabel("new tokens a second")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, fontsize=9)
        metadata: dict[str, Any] = {"Description": _as_text(speeds, title), "Software": None}
        figure.savefig(path, dpi=110, metadata=metadata)


def shows(speeds: Sequence[Speed], title: str, path: Path) -> bool:
    """Whether the file is the plot of these numbers."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return bool(image.info.get("Description") == _as_text(speeds, title))


def _panel(axes: Axes, speeds: Sequence[Speed]) -> None:
    columns = {
        "fastgen": [speed.fastgen for speed in speeds],
        "best": [speed.best for speed in speeds],
        "transformers": [speed.transformers or 0.0 for speed in speeds],
    }
    labels = {"best": "fastest other engine (named on its bar)"}
    for at, (name, values) in enumerate(columns.items()):
        places = [group + (at - 1) * _WIDTH for group in range(len(speeds))]
        label = labels.get(name, name)
        axes.bar(places, values, _WIDTH * 0.94, color=_COLORS[name], label=label)
    highest = max(columns["fastgen"])
    for group, speed in enumerate(speeds):
        left = group - _WIDTH
        axes.text(left, speed.fastgen + 0.02 * highest, f"{speed.fastgen:,.0f}", ha="center")
        axes.text(group, speed.best + 0.02 * highest, speed.best_name, ha="center", va="bottom",
                  rotation=90, fontsize=7.5, color="#555555")  # fmt: skip
    axes.set_xticks(range(len(speeds)), [speed.precision for speed in speeds])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.12 * highest)


def _as_text(speeds: Sequence[Speed], title: str) -> str:
    return json.dumps({"title": title, "speeds": [speed._asdict() for speed in speeds]})
