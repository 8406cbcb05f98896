"""Engines that take turns on the same requests, with speculation and without."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from speculation_tasks import NEW, Case, Ids, repeats_itself, repeats_prompt

from fastgen.bench.interleave import median, ratios, spread
from fastgen.engine.engine import Engine
from fastgen.errors import row_failed
from fastgen.sampling.params import SamplingParams

Record = dict[str, Any]
Cases = Sequence[Case]
_salts = (f"turn {number}" for number in itertools.count())


@dataclass(frozen=True)
class Turn:
    """What an engine made of some requests that came together.

    `decode_seconds` are those after the last prompt's first token; None where an engine does not
    say. Of its drafts, None likewise: `drafted` tokens were checked, `accepted` of them were right.
    """

    ids: list[Ids]
    seconds: float
    decode_seconds: float | None = None
    drafted: int | None = None
    accepted: int | None = None


class Subject(Protocol):
    """Something that takes turns.

    Attributes:
        name: its name in the record.
        exact: its tokens must be those of its baseline; else the record says which share is.
    """

    name: str
    exact: bool

    def take(self, cases: Cases, plain: Turn | None) -> Turn:
        """`plain`: what its baseline made of the same; None if this is the baseline."""
        ...


class Pair(NamedTuple):
    """A subject with speculation, and the same without."""

    baseline: Subject
    subject: Subject


class DifferentTokensError(Exception):
    """Speculation has changed what is generated."""


@dataclass
class Own:
    """fastgen. `prepare` is called before a turn, with the requests and their plain tokens."""

    name: str
    engine: Engine
    prepare: Callable[[Cases, list[Ids]], None] = lambda cases, ids: None
    exact: bool = field(default=True, init=False)

    def take(self, cases: Cases, plain: Turn | None) -> Turn:
        """With a salt of its own, so that no prompt is in the KV cache, and no text of an earlier
        turn among what drafts are taken from."""
        if plain is not None:
            self.prepare(cases, plain.ids)
        salt = next(_salts)
        options: Record = {"max_new_tokens": NEW, "ignore_eos": True}
        params = [SamplingParams(**options, **case.options) for case in cases]
        drafted, accepted = self._counts()
        start = time.perf_counter()
        requests = [
            self.engine.add_request(case.prompt, each, cache_salt=salt)
            for case, each in zip(cases, params, strict=True)
        ]
        self.engine.run(lambda: all(request.done for request in requests))
        seconds = time.perf_counter() - start
        rows = [request.rows[0] for request in requests]
        for row in rows:
            if row.finish_reason != "length":
                raise row_failed(f"{self.name}: a row ended with {row.finish_reason!r}", None)
        now_drafted, now_accepted = self._counts()
        return Turn(
            [list(row.new_token_ids) for row in rows],
            seconds,
            max(each.finished for each in requests) - max(each.first_token for each in requests),
            now_drafted - drafted,
            now_accepted - accepted,
        )

    def _counts(self) -> tuple[int, int]:
        return self.engine.stats.drafted_tokens, self.engine.stats.accepted_tokens


class Oracle:
    """Drafts for fastgen.load(speculate=...): knows what will come, and spoils a share of it.

    Each token of a text is spoiled or not by itself, by the seed alone; a draft is right up to the
    first that is spoiled. Prompts of one turn differ in their first KEY tokens.
    """

    KEY = 16

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._texts: dict[tuple[int, ...], Ids] = {}

    def __call__(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        text = self._texts[tuple(token_ids[: self.KEY])]
        return text[len(token_ids) : len(token_ids) + most]

    def spoiling(self, right: float) -> Callable[[Cases, list[Ids]], None]:
        """What teaches it the texts of a turn, each token right with this probability."""
        rng = np.random.default_rng(0)

        def learn(cases: Cases, ids: list[Ids]) -> None:
            self._texts = {
                tuple(case.prompt[: self.KEY]): [
                    *case.prompt,
                    *self._spoiled(written, rng.random(len(written)) >= right),
                ]
                for case, written in zip(cases, ids, strict=True)
            }

        return learn

    def _spoiled(self, ids: Ids, is_wrong: Iterable[bool]) -> Ids:
        return [
            (token_id + 1) % self._vocab_size if wrong else token_id
            for token_id, wrong in zip(ids, is_wrong, strict=True)
        ]


def interleave(
    pairs: Sequence[Pair], cases: Cases, batch: int, rounds: int, seconds: float = 0
) -> dict[str, list[Turn]]:
    """Turns of each subject: A B C, A B C, ...; the first round is not kept. Each round has other
    cases, as far as there are. There are `rounds` of them, or more: each subject is to run for so
    many seconds.

    Raises:
        DifferentTokensError: a subject that is to be exact is not.
    """
    baselines = list({pair.baseline.name: pair.baseline for pair in pairs}.values())
    turns: dict[str, list[Turn]] = {each.name: [] for each in baselines}
    turns |= {pair.subject.name: [] for pair in pairs}
    round_index = 0
    while round_index <= rounds or _shortest(turns) < seconds:
        first = round_index * batch
        chosen = [cases[at % len(cases)] for at in range(first, first + batch)]
        for baseline in baselines:
            plain = baseline.take(chosen, None)
            turns[baseline.name].append(plain)
            for subject in (pair.subject for pair in pairs if pair.baseline is baseline):
                turns[subject.name].append(_checked(subject, chosen, plain))
        round_index += 1
    return {name: taken[1:] for name, taken in turns.items()}


def _checked(subject: Subject, cases: Cases, plain: Turn) -> Turn:
    turn = subject.take(cases, plain)
    if subject.exact and turn.ids != plain.ids:
        raise DifferentTokensError(_told(subject.name, turn.ids, plain.ids))
    return turn


def _shortest(turns: dict[str, list[Turn]]) -> float:
    """Seconds that have been kept."""
    return min(sum(_seconds(taken[1:])) for taken in turns.values())


def _told(name: str, ids: list[Ids], plain: list[Ids]) -> str:
    for row, (own, wanted) in enumerate(zip(ids, plain, strict=True)):
        for at, (token, expected) in enumerate(zip(own, wanted, strict=False)):
            if token != expected:
                return f"{name}: token {at} of row {row} is {token}, without drafts {expected}"
    return f"{name}: rows have other lengths than without drafts"


def record_of(pair: Pair, turns: dict[str, list[Turn]]) -> Record:
    """One line of the results: how a subject did against its baseline, round by round."""
    plain, own = turns[pair.baseline.name], turns[pair.subject.name]
    tokens = [sum(map(len, turn.ids)) for turn in own]
    rows = [same for a, b in zip(plain, own, strict=True) for same in _same_rows(a, b)]
    record: Record = {
        "engine": pair.subject.name,
        "tokens_per_s": _speed(tokens, own),
        "without": _speed(tokens, plain),
        "times_faster": spread(ratios(_seconds(plain), _seconds(own))),
        "same_rows": round(sum(rows) / len(rows), 3),
        "rounds": len(own),
    }
    if own[0].decode_seconds is not None and plain[0].decode_seconds is not None:
        slow, fast = ([turn.decode_seconds for turn in each] for each in (plain, own))
        record["decode_times_faster"] = spread(ratios(slow, fast))
    if own[0].drafted is not None:
        drafted = sum(turn.drafted for turn in own)
        accepted = sum(turn.accepted for turn in own)
        record["drafted"], record["accepted"] = drafted, accepted
        record["acceptance"] = round(accepted / drafted, 3) if drafted else None
        record["tokens_per_step"] = round(sum(tokens) / (sum(tokens) - accepted), 2)
    return record


def repeats(cases: Cases, turns: Sequence[Turn], batch: int) -> Record:
    """Which share of the plain text repeats its prompt, and itself; `turns` are those kept."""
    written = [
        (cases[(round_index * batch + row) % len(cases)].prompt, ids)
        for round_index, turn in enumerate(turns, start=1)
        for row, ids in enumerate(turn.ids)
    ]
    shares = {
        "repeats_prompt": [repeats_prompt(ids, prompt) for prompt, ids in written],
        "repeats_itself": [repeats_itself(ids) for _, ids in written],
    }
    return {name: round(sum(each) / len(each), 3) for name, each in shares.items()}


def _same_rows(plain: Turn, own: Turn) -> list[bool]:
    return [a == b for a, b in zip(plain.ids, own.ids, strict=True)]


def _seconds(turns: Sequence[Turn]) -> list[float]:
    return [turn.seconds for turn in turns]


def _speed(tokens: Sequence[int], turns: Sequence[Turn]) -> float:
    return round(median(n / turn.seconds for n, turn in zip(tokens, turns, strict=True)), 1)
