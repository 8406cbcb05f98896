"""The forms in which a caller may give prompts and their parameters."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from fastgen.errors import OptionError, OptionTypeError
from fastgen.sampling.params import SamplingParams

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


def params_for(count: int, params: Params, options: dict[str, Any]) -> Sequence[SamplingParams]:
    """One SamplingParams for each prompt, in whatever form they were given."""
    if params is not None and options:
        told = f"give SamplingParams or options such as {next(iter(options))}, not both"
        raise OptionTypeError(told, "params")
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams(**options)] * count
    each = list(params) if isinstance(params, Iterable) else [params]
    for item in each:
        if not isinstance(item, SamplingParams):
            raise OptionTypeError(
                f"params must be SamplingParams, not {type(item).__name__}", "params"
            )
    if len(each) != count:
        raise OptionError(f"{len(each)} SamplingParams were given for {count} prompts", "params")
    return each


def is_one(prompts: Any) -> bool:
    """Whether this is one prompt: a string, or a sequence whose first element is an id."""
    if isinstance(prompts, str):
        return True
    items = to_list(prompts)
    return bool(items) and isinstance(items[0], numbers.Integral)


def as_list(prompts: Any) -> list[Any]:
    return [prompts] if is_one(prompts) else to_list(prompts)


def to_list(values: Any) -> list[Any]:
    """A list of a sequence, NumPy array or torch tensor."""
    items = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(items, bytes) or not isinstance(items, Sequence):  # an iterator is gone once read
        raise OptionTypeError(
            f"prompts must be a string or a list of strings or token ids, not "
            f"{type(values).__name__}",
            "prompt",
        )
    return list(items)
