"""Suffix automaton, store of outputs, and what both propose: C++ and Python say the same, and what
a search through all of the text says.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgen.native import native
from fastgen.speculation import suffix_automaton
from fastgen.speculation.suffix_automaton import MAX_MATCH, MAX_TOKENS, MAX_TRIES, MIN_MATCH

PARTS = [suffix_automaton] if native is None else [suffix_automaton, native]
LARGEST = 2**31 - 1
SALT, OTHER_SALT = b"0123" + b"a" * 28, b"0123" + b"b" * 28  # in the index they are alike

few = st.integers(0, 1)  # of such ids, texts repeat themselves all the time
some = st.one_of(st.integers(0, 6), st.sampled_from([50_256, 2**16, LARGEST]))
texts = st.one_of(
    st.lists(few, max_size=80),
    st.lists(some, max_size=80),
    st.builds(
        lambda part, times, rest: (part * times + rest)[:120],
        st.lists(some, min_size=1, max_size=7),
        st.integers(2, 30),
        st.lists(some, max_size=30),
    ),
)
examples = settings(deadline=None)

parts_named = pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts.__name__)


def common(ids: Sequence[int], end: int, row: Sequence[int]) -> int:
    """How many tokens before `end` are those at a row's end."""
    length = 0
    while length < min(end, len(row)) and ids[end - 1 - length] == row[-1 - length]:
        length += 1
    return length


def longest_suffix(ids: Sequence[int]) -> int:
    """Of those that also end earlier."""
    return max((common(ids, end, ids) for end in range(1, len(ids))), default=0)


@parts_named
@examples
@given(texts)
@example([1, 2, 2, 2, 2, 2, 3])  # as many edges as there can be
@example([0, 1, 1, 1, 1, 1, 1])  # as many states
def test_the_longest_suffix_that_occurred_before(parts: Any, ids: list[int]) -> None:
    automaton = parts.SuffixAutomaton()
    for at, token_id in enumerate(ids):
        automaton.add([token_id])
        if at % 4 and at < len(ids) - 1:
            continue
        seen = ids[: at + 1]
        length, end, hits, misses = automaton.match()
        assert length == longest_suffix(seen)
        if length == 0:
            assert (end, hits, misses) == (-1, 0, 0) and automaton.draft(9) == []
            continue
        assert end < at and common(seen, end + 1, seen) == length
        draft = automaton.draft(9)
        assert draft == [*seen[end + 1 :], *draft][: len(draft)]


@pytest.mark.skipif(native is None, reason="the C++ extension is not built")
@examples
@given(texts, st.integers(2, 40), st.integers(1, 9))
def test_the_same_automaton_in_both_languages(ids: list[int], max_tokens: int, chunk: int) -> None:
    """However long a row is, and in whatever chunks its tokens come."""
    ours, theirs = (parts.SuffixAutomaton(max_tokens) for parts in PARTS)
    whole = native.SuffixAutomaton(max_tokens)
    for start in range(0, len(ids), chunk):
        for automaton in (ours, theirs):
            automaton.add(ids[start : start + chunk])
        assert ours.match() == theirs.match()
        for most in (0, 1, chunk, 50):
            assert ours.draft(most) == theirs.draft(most)
    whole.add(ids)
    assert whole.match() == ours.match() and whole.draft(20) == ours.draft(20)


@parts_named
@examples
@given(st.lists(some, max_size=150), st.integers(2, 20))
def test_a_long_row_is_known_from_its_last_part(
    parts: Any, ids: list[int], max_tokens: int
) -> None:
    """At least half of max_tokens; what is known of the rest, if anything, is true."""
    automaton = parts.SuffixAutomaton(max_tokens)
    automaton.add(ids)
    length, end, *_ = automaton.match()
    assert length >= longest_suffix(ids[-(max_tokens // 2) :])
    assert length == 0 or (end < len(ids) - 1 and common(ids, end + 1, ids) >= length)


@parts_named
@pytest.mark.parametrize("part", [[7], [1, 2], [1, 2, 3, 4, 5]])
def test_a_row_that_repeats_itself_gets_all_that_is_asked_for(parts: Any, part: list[int]) -> None:
    automaton = parts.SuffixAutomaton()
    automaton.add(part * 4)
    assert automaton.draft(100) == (part * 100)[:100]


@parts_named
def test_a_draft_is_as_long_as_the_match_is_worth(parts: Any) -> None:
    passage = list(range(100, 200))
    automaton = parts.SuffixAutomaton()
    for known in range(1, 20):
        automaton = parts.SuffixAutomaton()
        automaton.add([*passage, 1, *passage[:known]])
        assert automaton.match() == (known, known - 1, 0, 0)
        assert automaton.draft(1000) == passage[known : 3 * known]
        assert automaton.draft(5) == passage[known : 3 * known][:5]


@parts_named
def test_what_was_wrong_is_trusted_less(parts: Any) -> None:
    """After token 5 always comes something new: soon one token is guessed, then none."""
    automaton = parts.SuffixAutomaton()
    lengths = []
    for number in range(20):
        automaton.add([5])
        lengths.append(len(automaton.draft(10)))
        assert automaton.match()[3] == max(0, number - 1)  # misses
        automaton.add([100 + number])
    assert lengths == [0, 2, *[1] * 8, *[0] * 10]


@parts_named
def test_what_is_long_past_counts_less(parts: Any) -> None:
    """After 32 times, half of it all."""
    automaton = parts.SuffixAutomaton()
    misses = 0
    for number in range(80):
        automaton.add([5])
        assert automaton.match()[2:] == (0, misses)
        if number > 0:
            misses = 16 if misses == 31 else misses + 1
        automaton.add([100 + number])


@parts_named
def test_a_draft_ends_where_it_was_wrong_before(parts: Any) -> None:
    """After 5, 6 the text went on in many ways."""
    automaton = parts.SuffixAutomaton()
    for number in range(4):
        automaton.add([5, 6, 100 + number])
    automaton.add([5])
    assert automaton.match()[:1] == (1,) and automaton.draft(10) == [6]


@parts_named
def test_the_last_occurrence_is_preferred(parts: Any) -> None:
    automaton = parts.SuffixAutomaton()
    automaton.add([1, 2, 3, 70, 1, 2, 3, 80, 1, 2, 3])
    assert automaton.draft(1) == [80]


def outputs_of(sizes: Sequence[int], ids: Sequence[int]) -> list[list[int]]:
    """ids, cut into pieces; what is not enough begins anew."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append([ids[(at + step) % len(ids)] for step in range(size)])
        at += size
    return pieces


def alive(outputs: Sequence[list[int]], capacity: int) -> list[list[int]]:
    """Those that a ring of this size still has, whole."""
    left = capacity
    kept: list[list[int]] = []
    for ids in reversed([ids for ids in outputs if len(ids) > MIN_MATCH]):
        left -= len(ids) + 8
        if left < 0:
            return kept
        kept.append(ids)
    return kept


def searched(outputs: Sequence[list[int]], row: list[int]) -> tuple[int, int]:
    """The longest match that has a token after it, and how many there are of three tokens."""
    longest, occurrences = 0, 0
    for ids in outputs:
        for end in range(MIN_MATCH, len(ids)):
            length = common(ids, end, row)
            longest = max(longest, length)
            occurrences += length >= MIN_MATCH
    return (min(longest, MAX_MATCH) if longest >= MIN_MATCH else 0), occurrences


@parts_named
@examples
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=30),
    st.lists(st.integers(0, 40), min_size=20, max_size=60),
    st.integers(0, 10_000),
    st.integers(1, 30),
)
def test_the_longest_match_in_the_store(
    parts: Any, sizes: list[int], ids: list[int], at: int, known: int
) -> None:
    """Of outputs that are still there; as many occurrences as there are tries are looked at."""
    capacity = 512
    store = parts.OutputStore(capacity)
    outputs = outputs_of(sizes, ids)
    for output in outputs:
        store.add(SALT, output)
    asked = outputs[at % len(outputs)]
    row = asked[: at % (len(asked) + 1)][-known:]
    length, hits, misses, draft = store.find(SALT, row, 5)
    kept = alive(outputs, capacity)
    longest, occurrences = searched(kept, row) if len(row) >= MIN_MATCH else (0, 0)
    assert length <= longest and hits + misses < max(1, min(occurrences, MAX_TRIES))
    if occurrences <= MAX_TRIES // 2:  # others in the same bucket count as tries
        assert (length > 0) == (longest > 0)
        assert length == longest and hits + misses == max(0, occurrences - 1)
    if length > 0:
        told = [*row[-length:], *draft]
        assert draft and any(_has(ids, told) for ids in kept)
    else:
        assert draft == []


def _has(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids)))


@pytest.mark.skipif(native is None, reason="the C++ extension is not built")
@examples
@given(
    st.lists(st.tuples(st.booleans(), texts), max_size=30),
    st.lists(texts, min_size=1, max_size=6),
    st.sampled_from([64, 128, 1024]),
)
def test_the_same_store_in_both_languages(
    outputs: list[tuple[bool, list[int]]], rows: list[list[int]], capacity: int
) -> None:
    """Rows between outputs too: with both salts, in a ring that is soon full."""
    stores = [parts.OutputStore(capacity) for parts in PARTS]
    assert stores[0].num_bytes == stores[1].num_bytes == 16 * capacity
    for number, (first, ids) in enumerate(outputs):
        salt = SALT if first else OTHER_SALT
        for store in stores:
            store.add(salt, ids, len(ids) // 4)
        tail = ids[: number % (len(ids) + 1)]
        assert stores[0].find(salt, tail, 9) == stores[1].find(salt, tail, 9)
    for ids in rows:
        for salt in (SALT, OTHER_SALT):
            ours, theirs = (
                parts.SuffixRow(store, salt) for parts, store in zip(PARTS, stores, strict=True)
            )
            for end in range(0, len(ids) + 1, 3):
                most = end % 12
                proposed = ours.propose(ids[:end], most)
                assert proposed == theirs.propose(ids[:end], most)
                assert len(proposed[0]) <= most and 0 <= proposed[1] <= 15


@parts_named
@examples
@given(st.lists(st.tuples(st.booleans(), st.lists(few, max_size=60)), max_size=40))
def test_no_salt_finds_what_has_another(parts: Any, outputs: list[tuple[bool, list[int]]]) -> None:
    """Each salt's outputs have ids of their own, and are asked for with the other's salt."""
    store = parts.OutputStore(128)
    for first, bits in outputs:
        ids = [bit + (0 if first else 100) for bit in bits]
        store.add(SALT if first else OTHER_SALT, ids)
        for shift, salt in ((0, OTHER_SALT), (100, SALT)):
            for row in ([0, 0, 0], [0, 1, 0], [1, 1, 0], ids):
                assert store.find(salt, [id_ % 100 + shift for id_ in row], 5)[0] == 0


@parts_named
def test_tokens_do_not_pass_for_a_salt(parts: Any) -> None:
    """An output's salt is overwritten with ids that are another salt's words, in a ring of 64."""
    words = list(range(1, 9))
    store = parts.OutputStore(64)
    store.add(array("i", [1, *range(90, 97)]).tobytes(), list(range(100, 140)))
    store.add(OTHER_SALT, [*range(200, 208), *words])
    assert store.find(array("i", words).tobytes(), [110, 111, 112], 5)[0] == 0
    assert store.find(OTHER_SALT, [206, 207, 1], 5) == (3, 0, 0, [2, 3, 4, 5, 6])


@parts_named
def test_the_newest_of_equal_matches_and_how_many_agree(parts: Any) -> None:
    store = parts.OutputStore(1024)
    for follower in (50, 60, 50, 70, 50):
        store.add(SALT, [1, 2, 3, follower, 9])
    assert store.find(SALT, [1, 2, 3], 5) == (3, 2, 2, [50, 9])
    store.add(SALT, [8, 1, 2, 3, 60, 61, 62])
    assert store.find(SALT, [8, 1, 2, 3], 2) == (4, 1, 4, [60, 61])
    assert store.find(SALT, [1, 2], 5) == store.find(SALT, [3, 60, 62], 5) == (0, 0, 0, [])


@parts_named
def test_what_was_overwritten_is_not_counted_again(parts: Any) -> None:
    """Each output takes a quarter of the ring, so that new ones lie exactly where old ones lay."""
    store = parts.OutputStore(64)
    for number in range(1, 12):
        store.add(SALT, [1, 2, 3, 4, 5, 6, 7, 8])
        assert store.find(SALT, [1, 2, 3], 2) == (3, min(number, 4) - 1, 0, [4, 5])


@parts_named
def test_a_draft_from_the_store_ends_with_the_output(parts: Any) -> None:
    store = parts.OutputStore(64)
    for start in (0, 100, 200, 300):
        store.add(SALT, list(range(start, start + 20)))
        assert store.find(SALT, [start + 10, start + 11, start + 12], 50)[3] == list(
            range(start + 13, start + 20)
        )
    assert store.find(SALT, [10, 11, 12], 50)[0] == 0  # it made room
    store.add(SALT, list(range(1000, 1200)))  # longer than the ring: its end is kept
    assert store.find(SALT, [1142, 1143, 1144], 50)[0] == 0
    assert store.find(SALT, [1144, 1145, 1146], 3) == (3, 0, 0, [1147, 1148, 1149])


@parts_named
def test_the_longer_of_both_matches_gives_the_draft(parts: Any) -> None:
    store = parts.OutputStore(1024)
    store.add(SALT, [1, 2, 3, 4, 70, 71])
    row = parts.SuffixRow(store, SALT)
    ids = [3, 4, 80, 81, 2, 3, 4]
    assert row.propose(ids, 9) == ([70, 71], 5)  # three of the store's, two of its own
    assert row.propose([*ids, 2, 3, 4], 2) == ([2, 3], 5)  # as many of its own
    assert parts.SuffixRow(store, OTHER_SALT).propose(ids, 1) == ([80], 2)


@parts_named
def test_what_cannot_be_is_refused_and_changes_nothing(parts: Any) -> None:
    store = parts.OutputStore(64)
    row = parts.SuffixRow(store, SALT)
    ids: list[Any] = [1, 2, 1, 2]
    assert row.propose(ids, 2) == ([1, 2], 2)
    for bad in (-1, 2**31, 2**70, 1.5, "1", None):
        with pytest.raises(ValueError, match="token_ids: must be integers"):
            row.propose([*ids, 1, bad], 2)
        with pytest.raises(ValueError, match="token_ids: must be integers"):
            store.add(SALT, [*ids, 1, bad])
        with pytest.raises(ValueError, match="token_ids: must be integers"):
            parts.SuffixAutomaton().add([*ids, 1, bad])
    assert row.propose(ids, 2) == ([1, 2], 2)
    with pytest.raises(ValueError, match="fewer tokens than there were"):
        row.propose(ids[:3], 2)
    with pytest.raises(ValueError, match="fewer tokens than there were"):
        store.add(SALT, ids, 5)
    with pytest.raises(ValueError, match="most"):
        row.propose(ids, -1)
    for capacity in (-64, 0, 63, 96, 2**29):
        with pytest.raises(ValueError, match="capacity"):
            parts.OutputStore(capacity)
    for max_tokens in (-1, 0, 1, 2**25):
        with pytest.raises(ValueError, match="max_tokens"):
            parts.SuffixAutomaton(max_tokens)
    with pytest.raises(ValueError, match="32 bytes"):
        store.add(b"short", ids)
    with pytest.raises(ValueError, match="32 bytes"):
        parts.SuffixRow(store, SALT + b"x")
    assert len(row.propose([*ids, 1, 2], 2**30)[0]) == suffix_automaton.MAX_DRAFT


@pytest.mark.skipif(native is None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lambda at, end: 0, id="one id"),
        pytest.param(lambda at, end: int(at > 0) + int(at == end), id="most edges"),
        pytest.param(lambda at, end: int(at > 0), id="most states"),
        pytest.param(lambda at, end: at, id="all differ"),
        pytest.param(lambda at, end: at.bit_count() % 2, id="no cubes"),
    ],
)
def test_the_memory_of_a_row_is_bounded(text: Any) -> None:
    for count in (1, 63, 64, 65, 1024, 1025, MAX_TOKENS, MAX_TOKENS + 1, 3 * MAX_TOKENS):
        row = native.SuffixRow(native.OutputStore(64), SALT)
        ids = [text(at, count - 1) for at in range(count)]
        for end in (count - 1, count):  # the last alone
            row.propose(ids[:end], 1)
        tokens = min(MAX_TOKENS, 1 << max(6, (count - 1).bit_length()))
        assert row.num_bytes <= 108 * tokens + 20  # of the root
