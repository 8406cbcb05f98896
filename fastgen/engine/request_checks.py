"""What can never be right in a request; found before anything is allocated or queued for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgen.checks import brief, integer, is_integer, real, text
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.blocks import blocks_needed
from fastgen.errors import shown
from fastgen.sampling.params import SamplingParams

MOST_URGENT, LEAST_URGENT = -1000, 1000


def check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise TypeError or ValueError for the first that is no id of the vocabulary."""
    if set(map(type, token_ids)) == {int} and 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        return  # nearly always, and much faster than one by one
    for token_id in token_ids:
        if not is_integer(token_id):
            raise TypeError(f"{name} holds {shown(token_id)}, which is not an integer token id")
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{name} holds token id {brief(token_id)}, outside the vocabulary of {vocab_size}"
            )


def check_params(params: Any, vocab_size: int) -> None:
    """What SamplingParams cannot know by itself: the vocabulary."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, not {type(params).__name__}")
    for word in params.bad_words:
        if isinstance(word, str):
            raise ValueError(f"bad_words holds the text {word!r}; the engine takes token ids")
    for name, ids in params.id_fields.items():
        if max(ids, default=0) >= vocab_size:  # that they are integers >= 0, it knows
            check_ids(name, ids, vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and wanted > vocab_size:
            raise ValueError(f"{name}={wanted} exceeds the vocabulary of {vocab_size}")


def checked_prompt(
    token_ids: Sequence[int], params: SamplingParams, vocab_size: int, limits: Capacity
) -> tuple[int, ...]:
    """The prompt as ints, if the decoder has room for it and what is to follow."""
    if not hasattr(token_ids, "__len__"):
        raise TypeError(f"the prompt must be a list of token ids, not {type(token_ids).__name__}")
    prompt_len = len(token_ids)
    if not prompt_len:
        raise ValueError("the prompt is empty: it needs at least one token id")
    longest = limits.max_seq_len - (params.max_new_tokens > 0)
    if prompt_len > longest:
        raise ValueError(
            f"the prompt has {prompt_len} tokens; with the context of {limits.max_seq_len} at most "
            f"{longest} can be taken"
        )
    check_ids("prompt", token_ids, vocab_size)
    num_blocks = blocks_needed(longest_row(prompt_len, params, limits))
    if num_blocks > limits.num_blocks:
        raise ValueError(
            f"a prompt of {prompt_len} tokens and {params.max_new_tokens} new ones may need "
            f"{num_blocks} KV blocks of {BLOCK_SIZE} tokens; there are {limits.num_blocks}"
        )
    return tuple(map(int, token_ids))


def longest_row(prompt_len: int, params: SamplingParams, limits: Capacity) -> int:
    """The tokens at which a row ends, whatever is drawn."""
    return min(prompt_len + params.max_new_tokens, limits.max_seq_len)


def check_options(
    params: SamplingParams,
    sinks: Sequence[Any] | None,
    deadline: Any,
    cache_salt: Any,
    priority: Any,
) -> None:
    """The other arguments of Engine.add_request."""
    if params.stop and sinks is None:
        raise ValueError("stop strings need text: this request has no TextSink")
    if sinks is not None and len(sinks) != params.num_rows:
        raise ValueError(f"{len(sinks)} sinks were given for {params.num_rows} rows")
    if deadline is not None:
        real("deadline", deadline, -math.inf, math.inf)
    if cache_salt is not None:
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt must be a string, not {type(cache_salt).__name__}")
        text("cache_salt", cache_salt)
    integer("priority", priority, MOST_URGENT, LEAST_URGENT)
