"""One request and its rows: what they were asked, what they have, how they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.blocks import Key, block_keys
from fastgen.engine.schedule_state import ScheduleState
from fastgen.errors import NothingToDrawError
from fastgen.results import FinishReason, Timings, TokenLogprobs
from fastgen.sampling.draw import Draw
from fastgen.sampling.options import unknown_to
from fastgen.sampling.params import SamplingParams
from fastgen.sampling.philox import sample_seed
from fastgen.speculation.drafter import Drafter
from fastgen.text.detokenizer import Sink


@dataclass(slots=True, eq=False)
class Row:
    """One completion on its way: num_rows of them make a request.

    A reader on another thread may look at `token_ids`, `logprobs` and `sink` at any time; it reads
    `finish_reason` first, since that is set last.
    """

    request: Request
    index: int  # which of the request's samples
    params: SamplingParams  # with the row's own seed, and what ranking needs
    token_ids: list[int]  # prompt, then what was drawn; empty until the row is admitted
    max_len: int  # the row ends when it has this many tokens
    stop_ids: frozenset[int]
    sink: Sink | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: BaseException | None = None  # why it ended with "error"
    raw_logits: list[NDArray[np.float32]] | None = (
        None  # float32 (V,) of each draw, if they are to be kept
    )
    schedule: ScheduleState = field(default_factory=ScheduleState)
    # constants, asked for in every step:
    prompt_len: int = field(init=False)
    prefill_len: int = field(init=False)  # the request's
    draws_on_host: bool = False  # the decoder's sampler does not know all of its options
    num_steps: int = 0  # that it was in
    num_drafted: int = 0  # tokens that were fed before they were drawn,
    num_accepted: int = 0  # and of them, those that were drawn

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_token_ids)
        self.prefill_len = self.request.prefill_len

    @property
    def scores_prompt(self) -> bool:
        """Whether this row's logits give the request its prompt_logprobs: the first sample's do."""
        return self.index == 0 and self.request.prompt_logprobs is not None

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def cache_salt(self) -> str | None:
        return self.request.cache_salt

    @property
    def ended_by_id(self) -> bool:
        """Whether its last token is an eos or stop id."""
        return self.finish_reason == "stop" and self.token_ids[-1] in self.stop_ids

    @property
    def new_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    def accept(self, draw: Draw, eos_ids: frozenset[int]) -> None:
        """Take a drawn token, and finish if it ends the row."""
        if not draw.ok:
            self.fail(NothingToDrawError())
            return
        token_id = draw.token_id
        if self.logprobs is not None and draw.logprobs is not None:
            self.logprobs.append(draw.logprobs)  # first: readers count tokens
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            if self.sink is not None and self.params.include_stop:
                self.sink.push(token_id)
            self.finish("stop", None if token_id in eos_ids else token_id)
        elif self.sink is not None and self.sink.push(token_id):
            self.finish("stop", self.sink.stop_reason)
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(
        self,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End the row; a sink that fails at its last text makes that an error."""
        try:
            if self.sink is not None:
                self.sink.finish()
        except KeyboardInterrupt:
            raise
        except BaseException as sinks:
            reason, stop_reason, error = "error", None, sinks if error is None else error
        self.error, self.stop_reason = error, stop_reason
        self.finish_reason = reason

    def fail(self, error: BaseException) -> None:
        self.finish("error", error=error)


class Listener(Protocol):
    """Called on the step's thread, within the step: it must be quick, and must not raise."""

    def row_drew(self, row: Row) -> None:
        """A row has got a token; it may have ended with it."""
        ...

    def request_ended(self, request: Request) -> None:
        """The last of its rows has ended, and holds nothing any more."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """One prompt with its options; see Engine.add_request.

    `error` is what made a step of several rows fail; what ended one row alone is in its own.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    deadline: float | None = None  # time.monotonic()
    cache_salt: str | None = None
    priority: int = 0  # lower is sooner
    listener: Listener | None = None
    drafter: Drafter | None = None  # instead of the engine's
    thread: int = field(default_factory=threading.get_ident)  # that made it
    rows: list[Row] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: BaseException | None = None
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_ended: int = 0  # rows
    _block_keys: list[Key] = field(default_factory=list)

    @property
    def block_keys(self) -> list[Key]:
        """Of the prompt's blocks, the last of which may be partly filled; hashed once."""
        if not self._block_keys:
            self._block_keys = block_keys(self.prompt_token_ids, self.cache_salt)
        return self._block_keys

    @property
    def done(self) -> bool:
        return self.finished is not None

    def row_drew(self, row: Row) -> None:
        """One of the rows has got a token."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        if self.listener is not None:
            self.listener.row_drew(row)

    def row_ended(self) -> None:
        """One of the rows has ended; the request is done with the last of them."""
        self.num_ended += 1
        assert self.num_ended <= len(self.rows), "a row ended twice"
        if self.num_ended == len(self.rows):
            self.finished = time.monotonic()
            if self.listener is not None:
                self.listener.request_ended(self)

    @property
    def timings(self) -> Timings:
        """Of a request that is done."""
        assert self.finished is not None

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self.arrived

        return Timings(
            admitted=since(self.admitted),
            first_token=since(self.first_token),
            finished=self.finished - self.arrived,
            steps=sum(row.num_steps for row in self.rows),
            drafted_tokens=sum(row.num_drafted for row in self.rows),
            accepted_tokens=sum(row.num_accepted for row in self.rows),
        )

    @property
    def prefill_len(self) -> int:
        """Prompt tokens that have to be computed; the last one only matters if one is drawn."""
        draws = self.params.max_new_tokens > 0
        return len(self.prompt_token_ids) - (0 if draws else 1)

    def make_rows(
        self,
        seed: int,
        max_len: int,
        stop_ids: frozenset[int],
        sinks: Sequence[Sink] | None,
        known_options: frozenset[str],
    ) -> None:
        """`known_options`: of the decoder; rows with others are drawn on the host."""
        params = self.params
        draws_on_host = bool(unknown_to(known_options, params))
        if params.logprobs is None and params.selects_best:  # ranking reads them
            params = replace(params, logprobs=0)
        for index in range(params.num_rows):
            self.rows.append(
                Row(
                    request=self,
                    index=index,
                    params=params.with_seed(sample_seed(seed, index)),
                    token_ids=[],  # n may be far more than run at a time
                    max_len=max_len,
                    stop_ids=stop_ids,
                    sink=None if sinks is None else sinks[index],
                    logprobs=None if params.logprobs is None else [],
                    draws_on_host=draws_on_host,
                )
            )
