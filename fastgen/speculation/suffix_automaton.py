"""Drafts from a row's own tokens and from earlier outputs, in plain Python.

The definition of what csrc/speculation does, with the same names and the same results, and what is
used where the extension is missing. Token ids are from 0 to 2**31 - 1.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_TOKENS = 4096  # of a row: then it forgets the first half of them
MAX_DRAFT = 1024  # tokens, whatever is asked for
RECENT_LINKS = 4  # states whose last occurrence is kept up to date with a token
MAX_EVIDENCE = 32  # hits and misses; then both count half

MIN_MATCH = 3  # of an earlier output, in tokens
MAX_MATCH = 64  # a longer one is told as so long
MAX_TRIES = 8  # earlier occurrences that are looked at
HEADER = 8  # places before an output in the store, for its salt
MIN_CAPACITY = 64

_SPREAD, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def draft_level(length: int, hits: int, misses: int) -> int:
    """How far to trust what continues a match, from 0 to 15.

    A match of one token has level 0; a longer one three levels by its length (2, up to 4, 8, 16,
    and more): of these the lowest if its continuation was wrong more often than right, the highest
    if it was right more often.
    """
    if length < 2:
        return 0
    bucket = min(4, (length - 1).bit_length() - 1)
    return 2 + 3 * bucket + (hits > misses) - (hits < misses)


def draft_length(length: int, hits: int, misses: int, most: int) -> int:
    """How many tokens to guess: none if fewer than one in ten is likely to be right, one if it was
    wrong more often than right, else twice as many as match."""
    if length == 0 or 10 * (hits + 1) < hits + misses + 2:
        return 0
    return min(most, MAX_DRAFT, 1 if misses > hits else 2 * length)


@dataclass(slots=True, eq=False)
class _State:
    """Substrings that end at the same places: the longest, and its suffixes down to one more than
    `link` has. `recent` is where an occurrence ends: the last that was looked at."""

    length: int
    link: _State | None
    recent: int
    hits: int = 0
    misses: int = 0
    edges: dict[int, _State] = field(default_factory=dict)


class SuffixAutomaton:
    """The suffix automaton of one row's tokens, kept token by token; amortised O(1) a token.

    Args:
        max_tokens: at least 2; a row that has more forgets all but the last half of them.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        if not 2 <= max_tokens <= 2**24:
            raise ValueError("max_tokens: must be from 2 to 2^24")
        self.max_tokens = max_tokens
        self.num_forgotten = 0
        self._begin()

    def add(self, token_ids: Sequence[int]) -> None:
        """Take the row's next tokens; ValueError, and none is taken, if one is no token id."""
        for token_id in _checked(token_ids):
            if len(self.tokens) == self.max_tokens:
                self._restart()
            self._add(token_id)

    def match(self) -> tuple[int, int, int, int]:
        """The longest suffix that occurred before (both may overlap).

        Returns:
            Its length, 0 if there is none; the index, among all tokens that were added, of the
            occurrence's last, or -1; how often what followed it was right, and wrong.
        """
        state = self._matched
        if state is None:
            return 0, -1, 0, 0
        return state.length, self.num_forgotten + state.recent, state.hits, state.misses

    def draft(self, most: int) -> list[int]:
        """What may follow, after the match; after the row's last token the same tokens come again.

        It stops where the continuation was wrong more often than right; if the row ends with the
        same tokens three times, only at MAX_DRAFT.
        """
        state = self._matched
        if state is None:
            return []
        first = state.recent + 1
        distance = len(self.tokens) - first
        repeats = state.length >= 2 * distance
        limit = draft_length(state.length, state.hits, state.misses, most)
        if limit > 0 and repeats:
            limit = min(most, MAX_DRAFT)
        ids: list[int] = []
        following = None if repeats else state
        for at in range(limit):
            if at > 0 and following is not None and following.misses > following.hits:
                break
            ids.append(self.tokens[first + at] if at < distance else ids[at - distance])
            following = None if following is None else following.edges.get(ids[-1])
        return ids

    @property
    def num_tokens(self) -> int:
        return self.num_forgotten + len(self.tokens)

    @property
    def _matched(self) -> _State | None:
        link = self._last.link
        return None if link is self._root else link

    def _begin(self) -> None:
        self.tokens: list[int] = []
        self._root = self._last = _State(0, None, -1)

    def _restart(self) -> None:
        kept = self.tokens[len(self.tokens) - self.max_tokens // 2 :]
        self.num_forgotten += len(self.tokens) - len(kept)
        self._begin()
        for token_id in kept:
            self._add(token_id)

    def _add(self, token_id: int) -> None:
        self._learn(token_id)
        position = len(self.tokens)
        self.tokens.append(token_id)
        added = _State(position + 1, self._root, position)
        at: _State | None = self._last
        while at is not None and token_id not in at.edges:
            at.edges[token_id] = added
            at = at.link
        if at is not None:
            added.link = self._split(at, token_id, at.edges[token_id])
        self._last = added

    def _learn(self, token_id: int) -> None:
        """The next token tells whether the match's continuation was right. Then the row's end is
        the last occurrence of the match and of its suffixes."""
        at = self._matched
        if at is None:
            return
        if self.tokens[at.recent + 1] == token_id:
            at.hits += 1
        else:
            at.misses += 1
        if at.hits + at.misses == MAX_EVIDENCE:
            at.hits //= 2
            at.misses //= 2
        for _ in range(RECENT_LINKS):
            if at is None or at is self._root:
                return
            at.recent = len(self.tokens) - 1
            at = at.link

    def _split(self, source: _State, token_id: int, target: _State) -> _State:
        """The state of the source's longest substring and the token: the target, unless that has
        longer ones; then the shorter get a state of their own."""
        if target.length == source.length + 1:
            return target
        shorter = _State(
            source.length + 1,
            target.link,
            target.recent,
            target.hits,
            target.misses,
            dict(target.edges),
        )
        target.link = shorter
        at: _State | None = source
        while at is not None and at.edges[token_id] is target:
            at.edges[token_id] = shorter
            at = at.link
        return shorter


class OutputStore:
    """The ends of earlier rows, shared by all rows of a model: a ring of tokens of a fixed size,
    with an index of three tokens at a time. The oldest make room for the newest.

    An output is found only by rows with the same salt: the salt's digest stands in the ring before
    the output's tokens, and is compared whole, as are the tokens.

    Args:
        capacity: of the ring, in tokens; a power of two, from 64 to 2**28. An output takes 8 more
            than it has. 16 bytes each.
    """

    def __init__(self, capacity: int) -> None:
        if not MIN_CAPACITY <= capacity <= 2**28 or capacity & (capacity - 1):
            raise ValueError("capacity: must be a power of two from 64 to 2^28")
        self._mask = capacity - 1
        self._shift = 64 - self._mask.bit_length()
        self._head = self._filled = 0
        self._tokens = _zeros(capacity)
        self._offsets = _zeros(capacity)  # of a token, its index in its output; negative in headers
        self._previous = _zeros(capacity)  # the next older place in the same bucket plus 1
        self._heads = _zeros(capacity)  # the newest place of each bucket plus 1

    @property
    def num_bytes(self) -> int:
        rings = (self._tokens, self._offsets, self._previous, self._heads)
        return sum(ring.itemsize * len(ring) for ring in rings)

    def add(self, salt: bytes, token_ids: Sequence[int], start: int = 0) -> None:
        """Keep token_ids[start:], the newest if they are more than the ring takes; three or fewer
        are not kept.

        Args:
            salt: 32 bytes, a digest.
        """
        words = _words(salt)
        ids = _from(token_ids, start)
        if len(ids) <= MIN_MATCH:
            return  # nothing to find it by
        ids = ids[max(0, len(ids) - (self._mask + 1 - HEADER)) :]
        for at, word in enumerate(words):
            self._put(word, at - HEADER)
        begin = self._head
        for at, token_id in enumerate(ids):
            self._put(token_id, at)
        for end in range(MIN_MATCH, len(ids)):  # what has a token after it
            place = (begin + end - 1) & self._mask
            bucket = self._bucket(words, ids[end - MIN_MATCH : end])
            self._previous[place] = self._heads[bucket]
            self._heads[bucket] = place + 1

    def find(
        self, salt: bytes, token_ids: Sequence[int], count: int
    ) -> tuple[int, int, int, list[int]]:
        """The longest match of a row's end, among the newest occurrences; of equally long ones, the
        newest.

        Returns:
            Its length, at most MAX_MATCH, and 0 if there is none; how many of the other
            occurrences go on like this one, and how many do not; up to `count` tokens after it.
        """
        words, ids = _words(salt), token_ids[-MAX_MATCH:]
        if len(ids) < MIN_MATCH:
            return 0, 0, 0, []
        found: list[tuple[int, int, int]] = []  # length, place, the next token
        last_age = -1
        following = self._heads[self._bucket(words, ids[-MIN_MATCH:])]
        for _ in range(MAX_TRIES):
            place = following - 1
            if place < 0 or self._age(place) <= last_age:  # no longer what the chain led to
                break
            last_age = self._age(place)
            length = self._common(words, ids, place)
            if length >= MIN_MATCH:
                found.append((length, place, self._tokens[(place + 1) & self._mask]))
            following = self._previous[place]
        if not found:
            return 0, 0, 0, []
        length, place, token_id = max(found, key=lambda one: one[0])
        hits = sum(one[2] == token_id for one in found) - 1
        return length, hits, len(found) - 1 - hits, self._continuation(place, min(count, MAX_DRAFT))

    def _continuation(self, place: int, count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count and self._goes_on(place):
            place = (place + 1) & self._mask
            ids.append(self._tokens[place])
        return ids

    def _age(self, place: int) -> int:
        return (self._head - 1 - place) & self._mask

    def _goes_on(self, place: int) -> bool:
        """Whether the next place has the next token of the same output."""
        following = self._offsets[(place + 1) & self._mask]
        return self._age(place) > 0 and following == self._offsets[place] + 1

    def _put(self, word: int, offset: int) -> None:
        self._tokens[self._head], self._offsets[self._head] = word, offset
        self._previous[self._head] = 0
        self._head = (self._head + 1) & self._mask
        self._filled = min(self._filled + 1, self._mask + 1)

    def _bucket(self, words: Sequence[int], ids: Sequence[int]) -> int:
        mixed = words[0] % 2**32
        for token_id in ids:
            mixed = ((mixed ^ token_id) * _SPREAD) & _WORD
            mixed ^= mixed >> 29
        return ((mixed * _SPREAD) & _WORD) >> self._shift

    def _common(self, words: Sequence[int], ids: Sequence[int], place: int) -> int:
        """How many tokens at the row's end are those at a place, which has a token after it."""
        offset = self._offsets[place]
        if offset < 0 or not self._goes_on(place):
            return 0
        if self._age(place) + offset + HEADER >= self._filled:
            return 0  # its salt has been overwritten
        start = place - offset - HEADER
        if any(self._tokens[(start + at) & self._mask] != word for at, word in enumerate(words)):
            return 0
        length, most = 0, min(len(ids), offset + 1)
        while length < most and self._tokens[(place - length) & self._mask] == ids[-1 - length]:
            length += 1
        return length


class SuffixRow:
    """What one row's own tokens and the store of earlier outputs say about its next tokens.

    Args:
        salt: 32 bytes; outputs with another are never found.
    """

    def __init__(self, store: OutputStore, salt: bytes) -> None:
        _words(salt)
        self._store, self._salt = store, salt
        self._automaton = SuffixAutomaton()

    def propose(self, token_ids: list[int], most: int) -> tuple[list[int], int]:
        """After the longer match; after the row's own if both are equally long.

        Args:
            token_ids: all of the row; those that are new since the last call are read.

        Returns:
            At most `most` ids that may follow, and their level (`draft_level`).

        Raises:
            ValueError: the row has fewer tokens than before, or what are no token ids.
        """
        automaton = self._automaton
        automaton.add(_from(token_ids, automaton.num_tokens))
        if most < 0:
            raise ValueError("most: must not be negative")
        length, _, hits, misses = automaton.match()
        ids = automaton.draft(most)
        if not ids or length < MAX_MATCH:
            found, same, other, stored = self._store.find(self._salt, automaton.tokens, most)
            if not ids or found > length:
                count = draft_length(found, same, other, most)
                return stored[:count], draft_level(found, same, other)
        return ids, draft_level(length, hits, misses)


def _checked(token_ids: Sequence[int]) -> Sequence[int]:
    if not all(isinstance(token_id, int) and 0 <= token_id < 2**31 for token_id in token_ids):
        raise ValueError("token_ids: must be integers from 0 to 2^31 - 1")
    return token_ids


def _from(token_ids: Sequence[int], start: int) -> Sequence[int]:
    if not 0 <= start <= len(token_ids):
        raise ValueError("token_ids: has fewer tokens than there were")
    return _checked(token_ids[start:])


def _words(salt: bytes) -> array[int]:
    if len(salt) != 4 * HEADER:
        raise ValueError("salt: must be 32 bytes")
    return array("i", salt)


def _zeros(count: int) -> array[int]:
    return array("i", bytes(4 * count))
