"""transformers' sampling loop on fastgen's engine: each row of the call is a request.

Shapes: B rows, T tokens of the prompts, padding included, N new tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from fastgen.engine.requests import Request, Row
from fastgen.errors import NothingToDrawError, ended_early
from fastgen.hf.cache import BlockCache
from fastgen.hf.forward import ID_DTYPES, UNSET, check_tokens
from fastgen.hf.kv_rows import Ints, KvRows, logits_of
from fastgen.hf.not_native import NotNative, check_known
from fastgen.hf.options import NativeOptions, Prompts, native_options
from fastgen.hf.stop_strings import StopStringSink
from fastgen.hf.streamers import RowStreamers
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.philox import sample_seed
from fastgen.speculation.drafter import Drafter

_KNOWN = {
    *("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"),
    *("tokenizer", "assistant_tokenizer"),
}


@dataclass(slots=True)
class SamplingCall:
    """One call of `generate`, with its options resolved.

    `num_drawn`: new tokens that are drawn; a forced eos comes after them.
    """

    prompts: Prompts
    options: NativeOptions
    cache: BlockCache | None
    sampled: bool
    returns_dict: bool
    gives_scores: bool
    gives_logits: bool
    processors: Any
    pad_id: int
    num_drawn: int
    device: torch.device
    streamer: Any = None

    @property
    def keeps_logits(self) -> bool:
        return self.gives_scores or self.gives_logits


def native_call(
    token_ids: Tensor,
    processors: Any,
    criteria: Sequence[Any],
    config: Any,
    streamer: Any,
    arguments: Mapping[str, Any],
) -> SamplingCall:
    """Read a call's options.

    Raises:
        NotNative: transformers' loop has to run it.
    """
    check_arguments(config, arguments)
    returns_dict = bool(config.return_dict_in_generate)
    starts = starts_of(token_ids, arguments)
    prompts = Prompts(token_ids.cpu().numpy(), starts)
    options = native_options(prompts, processors, criteria, sampled=config.do_sample)
    rows = len(prompts.token_ids)
    if options.stop_strings is not None and options.eos_ids is None and rows > 1:
        raise NotNative("rows that a stop string has ended go on without an eos")
    cache = arguments.get("past_key_values")
    _check_cache(cache, prompts, config, arguments)
    num_new = options.max_length - prompts.length
    pad = config._pad_token_tensor
    if pad is None and options.eos_ids is not None:
        raise NotNative("there is an eos, but nothing to pad with")
    return SamplingCall(
        prompts=prompts,
        options=options,
        cache=cache,
        sampled=bool(config.do_sample),
        returns_dict=returns_dict,
        gives_scores=returns_dict and bool(config.output_scores),
        gives_logits=returns_dict and bool(config.output_logits),
        processors=processors,
        pad_id=0 if pad is None else int(pad),
        num_drawn=num_new - (options.forced_eos is not None),
        device=token_ids.device,
        streamer=streamer,
    )


def generate_natively(kv: KvRows, call: SamplingCall, drafter: Drafter | None = None) -> Any:
    """Run the call's rows to their ends; returns what transformers' loop returns.

    Args:
        drafter: guesses their tokens, in place of the engine's own.

    Raises:
        NotNative: the rows cannot run; nothing has been streamed.
    """
    check_tokens(call.prompts.token_ids, kv.vocab_size)
    rows = _start(kv, call, drafter)
    run = _Run(kv, call, rows)
    try:
        run.to_the_end()
    except BaseException:
        for row in rows:
            kv.engine.cancel(row.request)
        raise
    new_ids = run.new_ids()  # (B, N)
    sequences = np.concatenate([call.prompts.token_ids, new_ids], axis=1)
    if call.cache is not None:
        _remember(call, sequences)
    output = torch.from_numpy(sequences).to(call.device)
    if not call.returns_dict:
        return output
    logits = _logits(kv, call, rows, sequences) if call.keeps_logits else ()
    logits = [step.to(call.device) for step in logits]
    return GenerateDecoderOnlyOutput(
        sequences=output,
        scores=_scores(call, output, logits) if call.gives_scores else None,
        logits=tuple(logits) if call.gives_logits else None,
        past_key_values=call.cache,
    )


def check_arguments(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise NotNative for what needs transformers' own forward, or its loop."""
    check_known(arguments, _KNOWN, UNSET)
    if not isinstance(arguments.get("logits_to_keep", 1), int):
        raise NotNative("logits_to_keep is not a number")
    for key in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, key):
            raise NotNative(f"{key} was asked for")
    if getattr(config, "is_assistant", False):
        raise NotNative("it drafts for another model")


def starts_of(token_ids: Tensor, arguments: Mapping[str, Any]) -> Ints:
    """Where each row begins, after its padding (B,)."""
    if token_ids.dim() != 2 or not token_ids.numel() or token_ids.dtype not in ID_DTYPES:
        raise NotNative("input_ids are not integers (B, T)")
    batch_size, length = token_ids.shape
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    starts = np.zeros(batch_size, np.int64)
    if mask is not None:
        attended = (mask != 0).cpu().numpy()
        if attended.shape != (batch_size, length):
            raise NotNative("attention_mask is not as long as the input")
        if not attended[:, -1].all() or (np.diff(attended.astype(np.int8), axis=1) < 0).any():
            raise NotNative("padding that is not on the left")
        starts = length - attended.sum(axis=1)
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype not in ID_DTYPES:
            raise NotNative("position_ids are no integers that an embedding takes")
        expected = np.maximum(np.arange(length) - starts[:, None], 0)
        given = positions.cpu().numpy()
        shapes = ((1, length), (batch_size, length))
        if given.shape not in shapes or (given != expected).any():
            raise NotNative("position_ids of its own")
    return starts


def _check_cache(cache: Any, prompts: Prompts, config: Any, arguments: Mapping[str, Any]) -> None:
    if cache is None:
        return
    if type(cache) is not BlockCache or cache.has_tensors:
        raise NotNative("past_key_values is another kind of cache")
    past = cache.get_seq_length()
    if past == 0:
        return
    mask = arguments.get("attention_mask")
    length = mask.shape[1] if mask is not None else getattr(config, "_mask_length", None)
    attended = np.arange(past) >= prompts.starts[:, None]
    if length != prompts.length or past >= length:
        raise NotNative("only what follows the cache was given")
    if cache.mask.shape != attended.shape or (cache.mask != attended).any():
        raise NotNative("the cache was made with another mask")
    same = (cache.token_ids == prompts.token_ids[:, :past]) | ~attended
    expected = np.arange(past) - prompts.starts[:, None]
    if not same.all() or ((cache.positions != expected) & attended).any():
        raise NotNative("the cache was made of other tokens")


def _start(kv: KvRows, call: SamplingCall, drafter: Drafter | None) -> list[Row]:
    """Add each row to the engine."""
    prompts = [
        ids[start:].tolist()
        for ids, start in zip(call.prompts.token_ids, call.prompts.starts, strict=True)
    ]
    longest = max(map(len, prompts)) + call.num_drawn
    if longest > kv.decoder.limits.max_seq_len:
        raise NotNative("rows may get longer than the context")
    if call.num_drawn == 0:
        return []
    seed = int(torch.randint(2**63 - 1, ())) if call.sampled else 0
    make = functools.partial(call.options.sampling_params, call.num_drawn, kv.vocab_size)
    params_of = functools.cache(make)  # of the bans, which few rows have
    requests: list[Request] = []
    try:
        with kv.room_for(len(prompt) + call.num_drawn for prompt in prompts):
            for row, prompt in enumerate(prompts):
                params = params_of(call.options.bans_of(row)).with_seed(sample_seed(seed, row))
                requests.append(_add(kv, call, row, prompt, params, drafter))
    except BaseException as error:
        for request in requests:
            kv.engine.cancel(request)
        if isinstance(error, (TypeError, ValueError)):
            raise NotNative(str(error)) from error
        raise
    return [request.rows[0] for request in requests]


def _add(
    kv: KvRows,
    call: SamplingCall,
    row: int,
    prompt: list[int],
    params: SamplingParams,
    drafter: Drafter | None,
) -> Request:
    stops, padded = call.options.stop_strings, call.prompts.token_ids[row].tolist()
    sinks = None if stops is None else [StopStringSink(stops, padded)]
    return kv.engine.add_request(
        prompt, params, sinks=sinks, keeps_logits=call.keeps_logits, drafter=drafter
    )


def _remember(call: SamplingCall, sequences: Ints) -> None:
    """The cache holds all but the last token, as after transformers' loop."""
    assert call.cache is not None
    count = sequences.shape[1] - 1
    starts = call.prompts.starts[:, None]
    positions = np.maximum(np.arange(count) - starts, 0)
    call.cache.remember(sequences[:, :count], np.arange(count) >= starts, positions)


def _logits(kv: KvRows, call: SamplingCall, rows: Sequence[Row], sequences: Ints) -> list[Tensor]:
    """Of each step float32 (B, V). In transformers' loop ended rows go on, with padding: that part
    is computed here."""
    length, num_steps = call.prompts.length, sequences.shape[1] - call.prompts.length
    steps = np.empty((num_steps, len(sequences), kv.vocab_size), np.float32)
    for at, start in enumerate(call.prompts.starts.tolist()):
        drawn = (rows[at].raw_logits or [])[:num_steps] if rows else []
        if drawn:
            steps[: len(drawn), at] = drawn
        if missing := num_steps - len(drawn):
            ids = sequences[at, start : length + num_steps - 1]
            steps[len(drawn) :, at] = logits_of(kv, ids, missing)
    return list(torch.from_numpy(steps))


def _scores(call: SamplingCall, sequences: Tensor, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What transformers' processors make of each step's logits (B, V)."""
    length = call.prompts.length
    return tuple(
        call.processors(sequences[:, : length + step], raw) for step, raw in enumerate(logits)
    )


class _Run:
    """The rows of a call on their way, and what has been streamed of them."""

    def __init__(self, kv: KvRows, call: SamplingCall, rows: Sequence[Row]) -> None:
        self._engine, self._call, self._rows = kv.engine, call, rows
        self._num_streamed = 0
        self._num_steps: int | None = None  # once that is known

    def to_the_end(self) -> None:
        while not self._is_over():
            self._engine.run(self._has_pending)
            self._stream()
        self._num_steps = self._count_steps()
        self._stream()
        if self._call.streamer is not None:
            self._call.streamer.end()

    def new_ids(self) -> Ints:
        """(B, N), padded after each row's end."""
        call, count = self._call, self._num_steps
        assert count is not None
        ids = np.full((len(call.prompts.token_ids), count), call.pad_id, np.int64)
        for at, row in enumerate(self._rows):
            new = row.token_ids[row.prompt_len : row.prompt_len + count]
            ids[at, : len(new)] = new
        if count > call.num_drawn:
            ids[:, -1] = self._step(call.num_drawn)
        return ids

    def _has_pending(self) -> bool:
        """Something to stream or to end; asked after each step, with the engine's lock held."""
        if self._is_over():
            return True
        return self._call.streamer is not None and self._num_common() > self._num_streamed

    def _is_over(self) -> bool:
        """All rows have ended; or the time is up, and each has at least one token."""
        ended = all(row.finish_reason is not None for row in self._rows)
        return ended or (self._is_late() and self._num_common() > 0)

    def _is_late(self) -> bool:
        deadline = self._call.options.deadline
        return deadline is not None and time.time() > deadline

    def _num_common(self) -> int:
        """Tokens that every row has, or will never have."""
        running = [_num_new(row) for row in self._rows if row.finish_reason is None]
        return min(running, default=max(map(_num_new, self._rows), default=0))

    def _count_steps(self) -> int:
        """The N of the result; rows that still run are ended."""
        running = [row for row in self._rows if row.finish_reason is None]
        if running:
            for row in running:
                self._engine.cancel(row.request)
            return min(map(_num_new, running))
        for row in self._rows:
            _raise_error(row, self._num_streamed)
        count = max(map(_num_new, self._rows), default=0)
        return count + self._forces_eos()

    def _forces_eos(self) -> bool:
        """Whether some row has come so far that its last token is forced."""
        if self._call.options.forced_eos is None:
            return False
        return any(row.finish_reason == "length" for row in self._rows) or not self._rows

    def _step(self, step: int) -> Ints:
        """The rows' tokens (B,) of one step."""
        call = self._call
        forced = call.options.forced_eos
        if step == call.num_drawn and forced is not None:  # after all that is drawn
            if not self._rows:
                return np.full(len(call.prompts.token_ids), forced)
            ended = [row.finish_reason == "stop" for row in self._rows]
            return np.where(ended, call.pad_id, forced)
        return np.array([_token(row, step, call.pad_id) for row in self._rows])

    def _stream(self) -> None:
        streamer = self._call.streamer
        if streamer is None:
            return
        count = self._num_common() if self._num_steps is None else self._num_steps
        while self._num_streamed < count:
            streamer.put(torch.from_numpy(self._step(self._num_streamed)))
            self._num_streamed += 1
            if isinstance(streamer, RowStreamers):
                for at, row in enumerate(self._rows):
                    if row.finish_reason is not None and _num_new(row) <= self._num_streamed:
                        streamer.end_row(at)


def _num_new(row: Row) -> int:
    return max(0, len(row.token_ids) - row.prompt_len)  # it has none before it is admitted


def _token(row: Row, step: int, pad_id: int) -> int:
    at = row.prompt_len + step
    return row.token_ids[at] if at < len(row.token_ids) else pad_id


def _raise_error(row: Row, num_streamed: int) -> None:
    """What made the row end; where nothing can be drawn, as transformers says it."""
    error = row.error or row.request.error
    if isinstance(error, NothingToDrawError):
        if not num_streamed:
            raise NotNative("there was nothing that could be drawn")
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if error is not None:
        raise error
    if row.finish_reason in ("cancelled", "timeout"):
        raise ended_early(f"generation ended: {row.finish_reason}", row.finish_reason)
