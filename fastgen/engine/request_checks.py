"""What can never be right in a request; found before anything is allocated or queued for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgen.checks import brief, integer, is_integer, real, text
from fastgen.decoders.interface import Capacity
from fastgen.decoders.memory import BLOCK_SIZE
from fastgen.engine.blocks import blocks_needed
from fastgen.errors import OptionError, OptionTypeError, shown
from fastgen.sampling.params import SamplingParams

MOST_URGENT, LEAST_URGENT = -1000, 1000


def check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise an error of the option `name` for the first that is no id of the vocabulary."""
    if set(map(type, token_ids)) == {int} and 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        return  # nearly always, and much faster than one by one
    for token_id in token_ids:
        if not is_integer(token_id):
            raise OptionTypeError(
                f"{name} holds {shown(token_id)}, which is not an integer token id", name
            )
        if not 0 <= token_id < vocab_size:
            raise OptionError(
                f"{name} holds token id {brief(token_id)}, outside the vocabulary of {vocab_size}",
                name,
            )


def check_params(params: Any, vocab_size: int) -> None:
    """What SamplingParams cannot know by itself: the vocabulary."""
    if not isinstance(params, SamplingParams):
        told = f"params must be SamplingParams, not {type(params).__name__}"
        raise OptionTypeError(told, "params")
    for word in params.bad_words:
        if isinstance(word, str):
            told = f"bad_words holds the text {word!r}; the engine takes token ids"
            raise OptionError(told, "bad_words")
    for name, ids in params.id_fields.items():
        if max(ids, default=0) >= vocab_size:  # that they are integers >= 0, it knows
            check_ids(name, ids, vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and wanted > vocab_size:
            problem = f"{wanted} exceeds the vocabulary of {vocab_size}"
            raise OptionError(f"{name}={problem}", name, problem)


def checked_prompt(
    token_ids: Sequence[int], params: SamplingParams, vocab_size: int, limits: Capacity
) -> tuple[int, ...]:
    """The prompt as ints, if the decoder has room for it and what is to follow."""
    if not hasattr(token_ids, "__len__"):
        told = f"the prompt must be a list of token ids, not {type(token_ids).__name__}"
        raise OptionTypeError(told, "prompt")
    prompt_len = len(token_ids)
    if not prompt_len:
        raise OptionError("the prompt is empty: it needs at least one token id", "prompt")
    longest = limits.max_seq_len - (params.max_new_tokens > 0)
    if prompt_len > longest:
        raise OptionError(
            f"the prompt has {prompt_len} tokens; with the context of {limits.max_seq_len} at most "
            f"{longest} can be taken",
            "prompt",
        )
    check_ids("prompt", token_ids, vocab_size)
    num_blocks = blocks_needed(longest_row(prompt_len, params, limits))
    if num_blocks > limits.num_blocks:
        raise OptionError(
            f"a prompt of {prompt_len} tokens and {params.max_new_tokens} new ones may need "
            f"{num_blocks} KV blocks of {BLOCK_SIZE} tokens; there are {limits.num_blocks}",
            "prompt",
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
        raise OptionError("stop strings need text: this request has no TextSink", "stop")
    if sinks is not None and len(sinks) != params.num_rows:
        raise OptionError(f"{len(sinks)} sinks were given for {params.num_rows} rows", "sinks")
    if deadline is not None:
        real("deadline", deadline, -math.inf, math.inf)
    if cache_salt is not None:
        if not isinstance(cache_salt, str):
            told = f"cache_salt must be a string, not {type(cache_salt).__name__}"
            raise OptionTypeError(told, "cache_salt")
        text("cache_salt", cache_salt)
    integer("priority", priority, MOST_URGENT, LEAST_URGENT)
