"""Drafts for the rows of a step: which rows get some, how many, and what became of them.

Nothing here can change a token: a draft is checked against what is drawn. So whatever a drafter
does wrong costs time alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from fastgen.checks import is_integer
from fastgen.decoders.interface import Decoder, PendingStep
from fastgen.engine.requests import Row
from fastgen.engine.scheduler import StepPlan
from fastgen.speculation.acceptance import Acceptance
from fastgen.speculation.costs import AskCosts, StepCosts
from fastgen.speculation.drafter import MAX_LEVEL, Draft, Drafter
from fastgen.speculation.lengths import choose_lengths, choose_rounds

logger = logging.getLogger("fastgen")
MOST_DRAFTED = 32  # tokens of one row in a step
_DRY = 8  # steps without a draft after which no step waits for a row any more
_SELDOM = 16  # steps without a draft after which a row is asked for at every fourth only
_PROBE = 32  # steps after which it is asked again, or a draft is tried that seems not worth it
_PROBE_SHARE = 0.02  # of the time of all steps that go by, which asking it again takes at most
_CHEAP = 0.02  # a drafter that takes no more of a step's time is asked as if it took none
_FIRST = 8  # tokens of each row that a drafter is asked for whose time is not known
_ANSWERED_MEMORY = 0.2  # the share of the evidence that each answer replaces
_TRIES = 2  # drafts of a new row of which one token is tried, worth it or not
_NOTHING = Draft(())


@dataclass(slots=True, eq=False)
class _Source:
    """A drafter, and what is known of its drafts, whichever row they are for."""

    drafter: Drafter
    acceptance: Acceptance = field(default_factory=Acceptance)
    costs: AskCosts = field(default_factory=AskCosts)
    answered: float = 1.0  # the share of rows for which it had a draft
    num_rows: int = 0
    unasked: int = 0  # steps since it was asked, for it did not seem worth its time
    was_asked: bool = False
    has_failed: bool = False
    is_lost: bool = False  # only the parent of this process can ask it

    def note_answer(
        self, states: Sequence[_RowDrafts], num_tokens: int, drafts: Sequence[Draft], seconds: float
    ) -> None:
        """It was asked for so many tokens for each of these rows, and took so long."""
        had_any = sum(bool(draft.ids) for draft in drafts) / len(drafts)
        self.answered += _ANSWERED_MEMORY * (had_any - self.answered)
        # Then the time has more in it than a guess, and cannot be more than that.
        read_rows = self.drafter.reads_rows and not all(state.was_asked for state in states)
        bound = self.costs.seconds(num_tokens) if read_rows else math.inf
        if self.was_asked and seconds < bound:  # the first time, it may have had to load something
            self.costs.observe(num_tokens, seconds)
        self.was_asked = True
        for state in states:
            state.was_asked = True


@dataclass(slots=True)
class _RowDrafts:
    """What is kept of a row: who drafts for it, in the order in which they are asked, and how often
    each was right.

    `used`: whose its last draft is, and `level` that draft's. `dry`: steps since that. `unused`:
    drafts that did not seem worth their time since one was used, and `num_tries`, of how many a
    token was tried all the same. `was_asked`: a drafter that takes time was asked for it in the
    step before, if it was its turn.
    `failed`: drafters that failed with this row, and are not asked again.
    """

    sources: tuple[_Source, ...]
    acceptances: tuple[Acceptance, ...]
    used: int = 0
    level: int = 0
    dry: int = 0
    unused: int = 0
    num_tries: int = 0
    was_asked: bool = False
    failed: set[_Source] = field(default_factory=set)

    @property
    def share(self) -> float:
        """The probability that the next token of its draft is right."""
        return self.acceptances[self.used].share(self.level)

    def may_guess(self, source: _Source) -> bool:
        return source not in self.failed and not source.is_lost

    def may_use(self, at: int, has_draft: bool, num_tokens: int) -> bool:
        """Whether to ask source `at`: it has not failed, and is more often right than the draft
        that the row has. Asking costs time as well."""
        if at >= len(self.sources) or not self.may_guess(self.sources[at]):
            return False
        if self.dry > _SELDOM and num_tokens % 4:
            return False
        return not has_draft or self.acceptances[at].share(0) > self.share


class Drafting:
    """The drafts of one engine's rows. Used by its step alone.

    Attributes:
        drafters: of rows whose request brings none, in the order in which they are asked.
        is_on: some row may have a drafter.
        costs: of the decoder's steps.
        clock: what times are measured with, in seconds.
    """

    def __init__(self, vocab_size: int) -> None:
        self.costs = StepCosts()
        self.clock: Callable[[], float] = time.monotonic
        self._vocab_size = vocab_size
        self.drafters: tuple[Drafter, ...] = ()
        self.is_on = False
        self._sources: dict[int, _Source] = {}  # by id() of the drafter, which they keep
        self._rows: dict[Row, _RowDrafts] = {}

    def use(self, drafters: Sequence[Drafter]) -> None:
        """Have these, which are closed with the engine; before the first request comes."""
        self.drafters = tuple(drafters)
        self.is_on = bool(drafters)

    def warmup(self) -> None:
        """Do now what the drafters' first guesses would have to."""
        for drafter in self.drafters:
            drafter.warmup()

    def inherit(self) -> None:
        """In a forked child: go on without drafters that only the parent can ask."""
        self.drafters = tuple(one for one in self.drafters if one.survives_fork)
        for source in self._sources.values():
            source.is_lost = not source.drafter.survives_fork

    def make_drafts(self, rows: Sequence[Row], num_rows: int, room: int) -> list[Sequence[int]]:
        """Drafts for these rows of a step of `num_rows` rows, `room` tokens in all at most.

        Each of the rows may get two tokens or more until it ends.
        """
        states = [self._state(row) for row in rows]
        drafts: list[Sequence[int]] = [()] * len(rows)
        for state in states:
            state.dry += 1
        for turn in range(max(len(state.sources) for state in states)):
            self._ask(turn, rows, states, drafts, num_rows)
        drafted = [at for at, draft in enumerate(drafts) if draft]
        if drafted:
            shares = [states[at].share for at in drafted]
            most = [len(drafts[at]) for at in drafted]
            lengths = choose_lengths(shares, most, num_rows, self.costs, room)
            room -= sum(lengths)
            for at, length in zip(drafted, lengths, strict=True):
                tried = _tried(states[at], length, room)
                room -= tried - length
                drafts[at] = drafts[at][:tried]
        return drafts

    def timed_step(self, decoder: Decoder, plan: StepPlan) -> PendingStep:
        """The decoder's step; of those that only decode, what they cost is remembered."""
        started = self.clock()
        step = decoder.step(plan.batch)
        only_decodes = plan.num_decoding == len(plan.entries)
        if self.is_on and only_decodes and not step.is_async:
            seconds = self.clock() - started
            self.costs.observe(plan.num_decoding, plan.num_drafted, seconds)
        return step

    def holds_up(self, rows: Iterable[Row]) -> bool:
        """Whether the next step should wait for this one, since drafts may follow its tokens."""
        for row in rows if self.is_on else ():
            state = None if row.draws_on_host else self._state(row)
            if state is None or not any(state.may_guess(source) for source in state.sources):
                continue
            if state.dry < _DRY or len(row.token_ids) % _PROBE == 0:
                return True
        return False

    def took(self, row: Row, draft: Sequence[int], num_accepted: int) -> None:
        """A row has got what a step with its draft gave it."""
        state = self._state(row)
        source = state.sources[state.used]
        state.acceptances[state.used].note(state.level, len(draft), num_accepted)
        with self._guarded(source, state):
            source.drafter.accepted(row, draft[:num_accepted])

    def ended(self, row: Row) -> None:
        """A row that had been admitted has ended."""
        if not self.is_on:
            return
        state = self._state(row)
        del self._rows[row]
        for source in state.sources:
            if not source.is_lost:
                with self._guarded(source, state):
                    source.drafter.ended(row)
            source.num_rows -= 1
            if not source.num_rows and not any(one is source.drafter for one in self.drafters):
                del self._sources[id(source.drafter)]

    def close(self) -> None:
        with ExitStack() as drafters:
            for drafter in self.drafters:
                drafters.callback(drafter.close)

    def _state(self, row: Row) -> _RowDrafts:
        state = self._rows.get(row)
        if state is None:
            own = row.request.drafter
            drafters = self.drafters if own is None else (own,)
            if not row.params.speculate or row.draws_on_host:
                drafters = ()
            sources = tuple(map(self._source_of, drafters))
            acceptances = tuple(Acceptance(source.acceptance) for source in sources)
            state = self._rows[row] = _RowDrafts(sources, acceptances)
        return state

    def _source_of(self, drafter: Drafter) -> _Source:
        source = self._sources.get(id(drafter))
        if source is None:
            source = self._sources[id(drafter)] = _Source(drafter)
        source.num_rows += 1
        return source

    def _ask(
        self,
        turn: int,
        rows: Sequence[Row],
        states: Sequence[_RowDrafts],
        drafts: list[Sequence[int]],
        num_rows: int,
    ) -> None:
        """Ask the drafters that come at this turn, for rows with which they may do better."""
        asked: dict[_Source, list[int]] = {}  # indices of rows
        for at, state in enumerate(states):
            if state.may_use(turn, bool(drafts[at]), len(rows[at].token_ids)):
                asked.setdefault(state.sources[turn], []).append(at)
        for source, places in asked.items():
            shares = [states[at].acceptances[turn].share(0) for at in places]
            proposed = self._drafts_of(source, [rows[at] for at in places], shares, num_rows)
            for at, draft in zip(places, proposed, strict=True):
                if draft.ids:
                    drafts[at] = draft.ids
                    states[at].used, states[at].level = turn, draft.level

    def _drafts_of(
        self, source: _Source, rows: Sequence[Row], shares: Sequence[float], num_rows: int
    ) -> Sequence[Draft]:
        """What the drafter proposes for its rows, as far as asking it is worth its time."""
        most = [min(MOST_DRAFTED, row.max_len - 1 - len(row.token_ids)) for row in rows]
        if source.drafter.is_free:
            return self._proposed(source, rows, most)
        states = [self._rows[row] for row in rows]
        wanted = self._num_wanted(source, shares, max(most), num_rows)
        if not wanted:
            for state in states:
                state.was_asked = False
            return [_NOTHING] * len(rows)
        started = self.clock()
        drafts = self._proposed(source, rows, [min(wanted, count) for count in most])
        source.note_answer(states, wanted, drafts, self.clock() - started)
        return drafts

    def _num_wanted(
        self, source: _Source, shares: Sequence[float], most: int, num_rows: int
    ) -> int:
        """How many tokens of each row a drafter is asked for that takes time; often none."""
        costs, step = source.costs, self.costs.seconds(num_rows)
        if not costs.is_measured and not source.drafter.reads_rows:
            return min(most, _FIRST)
        if costs.is_measured and costs.seconds(most) <= _CHEAP * step:
            return most
        wanted = choose_rounds(shares, most, num_rows, self.costs, costs.seconds, source.answered)
        source.unasked = 0 if wanted else source.unasked + 1
        is_affordable = costs.seconds(1) <= _PROBE_SHARE * source.unasked * step
        if source.unasked >= _PROBE and is_affordable:  # texts change
            wanted, source.unasked = 1, 0
        return wanted

    def _proposed(
        self, source: _Source, rows: Sequence[Row], most: Sequence[int]
    ) -> Sequence[Draft]:
        """One draft a row, without what cannot be a token; a drafter that fails is asked for one
        row after the other, and for those with which it fails no more."""
        try:
            drafts = source.drafter.propose(rows, most)
            if len(drafts) != len(rows):
                raise ValueError(f"{len(drafts)} drafts were proposed for {len(rows)} rows")
            return [self._possible(draft, count) for draft, count in zip(drafts, most, strict=True)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if len(rows) == 1:
                self._drop(source, self._rows[rows[0]], error)
                return [_NOTHING]
        alone = zip(rows, most, strict=True)
        return [self._proposed(source, [row], [count])[0] for row, count in alone]

    def _possible(self, draft: Draft, most: int) -> Draft:
        """As much of a draft as can be tokens."""
        if not draft.ids:
            return _NOTHING
        ids = list(draft.ids[:most])
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= self._vocab_size:
            fits = (is_integer(one) and 0 <= one < self._vocab_size for one in ids)
            ids = list(map(int, ids[: next((at for at, fit in enumerate(fits) if not fit), None)]))
        return Draft(ids, min(max(int(draft.level), 0), MAX_LEVEL))

    @contextmanager
    def _guarded(self, source: _Source, state: _RowDrafts) -> Iterator[None]:
        """What a drafter raises costs its row the drafts, and nothing else."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._drop(source, state, error)

    def _drop(self, source: _Source, state: _RowDrafts, error: BaseException) -> None:
        state.failed.add(source)
        if not source.has_failed:  # once: it may be asked for thousands of rows
            source.has_failed = True
            logger.error(
                "a drafter failed: the rows that it failed with go on without drafts",
                exc_info=error,
            )


def _tried(state: _RowDrafts, length: int, room: int) -> int:
    """Its length, or one token of a draft that does not seem worth its time: of a row's first, and
    now and then."""
    if length:
        state.dry = state.unused = 0
        return length
    state.unused += 1
    if room > 0 and (state.num_tries < _TRIES or state.unused % _PROBE == 0):
        state.num_tries += 1
        return 1
    return 0
