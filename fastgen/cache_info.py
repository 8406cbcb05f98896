"""What `fastgen info` says of the cache of packed weights."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fastgen.checkpoints.checkpoint import Checkpoint
from fastgen.decoders.cpu.plan import is_cached
from fastgen.decoders.cpu.weights import cached_models
from fastgen.decoders.memory import MB
from fastgen.decoders.pack_cache import PackCache, chosen_folder
from fastgen.decoders.plan import DecoderPlan

Record = dict[str, Any]


def cache_record(checkpoint: Checkpoint, plan: DecoderPlan) -> Record | None:
    """Where packed weights are kept, and what is there; None if they are not kept."""
    if plan.cache is None:
        return None
    cache = PackCache(Path(plan.cache))
    record: Record = {
        "folder": plan.cache, "max_bytes": cache.max_bytes, "problem": None,
        "has_this_model": False, "models": [],
    }  # fmt: skip
    try:
        record["has_this_model"] = is_cached(checkpoint, plan)
        record["models"] = [dataclasses.asdict(model) for model in cached_models(cache)]
    except OSError as error:
        record["problem"] = str(error)
    return record


def cleared(cache: bool | str) -> str:
    """Remove what the cache of `load(cache=...)` has; says what that was.

    Raises:
        OptionError, OSError: there is no such folder, or it may be another user's.
    """
    folder = chosen_folder(cache)
    if folder is None:
        return "there is no cache to clear"
    removed = PackCache(folder).clear()
    used = sum(entry.num_bytes for entry in removed)
    return f"{folder}: removed {len(removed)} files, {used / MB:,.0f} MB"


def cache_lines(record: Record | None) -> list[str]:
    """The same for people."""
    if record is None:
        return ["none"]
    if record["problem"] is not None:
        return [f"{record['folder']} cannot be used: {record['problem']}"]
    used = sum(model["num_bytes"] for model in record["models"])
    first = (
        f"{record['folder']}: {used / MB:,.0f} of {record['max_bytes'] / MB:,.0f} MB, "
        f"with{'' if record['has_this_model'] else 'out'} this model"
    )
    return [first, *map(_model_line, record["models"])]


def _model_line(model: Record) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model["used"]))
    size = f"{model['num_bytes'] / MB:,.0f} MB, used {used}"
    if model["name"] is None:
        return f"a file that cannot be read: {size}"
    return f"{model['name']}: {model['weights']} weights, {model['dtype']}, {size}"
