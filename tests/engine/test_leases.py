"""Leases by themselves: several on one pool, in any order of operations, against a plain model of
what every block holds; and what taking tokens back does, case by case.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import fastgen
from fastgen.decoders.memory import BLOCK_SIZE, blocks_for
from fastgen.engine.blocks import BlockPool, Key, block_keys
from fastgen.engine.leases import Acquired, Copies, Lease, NoRoom, PrefixPending
from fastgen.errors import EngineError
from simulation import TEXTS, FailingPool, pending_blocks

NUM_BLOCKS = 14
LONGEST = 150
WHICH = st.integers(0, 10**6)


@dataclass(eq=False)
class Held:
    """A lease, the tokens that are in it, and those that its holder has promised to compute."""

    lease: Lease
    tokens: list[int]
    to_come: list[int] = field(default_factory=list)


class LeaseModel(RuleBasedStateMachine):
    """A slot's content is the whole sequence up to its token, as keys and values depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = FailingPool(NUM_BLOCKS)
        self.held: list[Held] = []
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.known: dict[Key, tuple[int, ...]] = {}  # keys that were made, and of which tokens

    @rule(
        text=st.integers(0, 2), length=st.integers(1, 120), spare=st.integers(0, 2),
        looks_up=st.booleans(), wait=st.booleans(),
    )  # fmt: skip
    def acquire_for_a_row(
        self, text: int, length: int, spare: int, looks_up: bool, wait: bool
    ) -> None:
        """With all the blocks that it can need, and its prompt announced."""
        lease, prompt = Lease(self.pool), TEXTS[text][:length]
        try:
            outcome = lease.acquire(
                self.keys_of(prompt), length, reuse=length - 1 if looks_up else None,
                announce=length, num_blocks=blocks_for(length) + spare, wait=wait,
            )  # fmt: skip
        except MemoryError:
            assert lease.blocks == [] and lease.num_tokens == 0
            return
        if isinstance(outcome, Acquired):
            assert lease.num_tokens < length, "its last token is computed in any case"
            assert looks_up or lease.num_tokens == 0
            self.copy(outcome.copies)
            cached = lease.num_tokens
            self.held.append(Held(lease, prompt[:cached], prompt[cached:]))
            return
        assert lease.blocks == []
        if isinstance(outcome, PrefixPending):
            assert wait and outcome.block in pending_blocks(self.pool)
        else:
            assert isinstance(outcome, NoRoom)
            assert self.pool.num_free < blocks_for(length) + spare

    @rule(text=st.integers(0, 2), length=st.integers(1, 120))
    def acquire_what_there_is(self, text: int, length: int) -> None:
        """As a caller does that grows block by block."""
        lease, num_full = Lease(self.pool), length // BLOCK_SIZE
        keys = self.keys_of(TEXTS[text][:length])[:num_full]
        self.pool.failures = 0
        outcome = lease.acquire(keys, BLOCK_SIZE * num_full, reuse=BLOCK_SIZE * num_full)
        assert isinstance(outcome, Acquired) and not outcome.copies
        assert len(lease.blocks) == blocks_for(lease.num_tokens)
        self.held.append(Held(lease, TEXTS[text][: lease.num_tokens]))

    @precondition(lambda self: self.held)
    @rule(which=WHICH, count=st.integers(1, 40), text=st.integers(0, 2))
    def extend(self, which: int, count: int, text: int) -> None:
        one = self.held[which % len(self.held)]
        following = TEXTS[text][len(one.tokens) + len(one.to_come) :]
        new = [*one.to_come, *following][: min(count, LONGEST - len(one.tokens))]
        before = (list(one.lease.blocks), one.lease.num_tokens)
        try:
            copies = one.lease.extend(len(new))
        except (EngineError, MemoryError):
            assert (one.lease.blocks, one.lease.num_tokens) == before
            return
        self.copy(copies)
        one.to_come = one.to_come[len(new) :]
        for token in new:
            index, offset = divmod(len(one.tokens), BLOCK_SIZE)
            block = one.lease.blocks[index]
            assert self.pool.ref_count(block) == 1, "a block is written that others hold"
            one.tokens.append(token)
            self.slots[block, offset] = tuple(one.tokens)

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def register(self, which: int) -> None:
        one = self.held[which % len(self.held)]
        self.keys_of(one.tokens[: len(one.tokens) // BLOCK_SIZE * BLOCK_SIZE])
        one.lease.register(len(one.tokens), one.tokens)
        assert one.lease.register_at > len(one.tokens)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, count=st.integers(0, 70))
    def rewind(self, which: int, count: int) -> None:
        one = self.held[which % len(self.held)]
        count = min(count, len(one.tokens))
        one.lease.rewind(count)
        del one.tokens[len(one.tokens) - count :]
        one.to_come = one.to_come if count == 0 else []

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def share(self, which: int) -> None:
        one = self.held[which % len(self.held)]
        self.held.append(Held(one.lease.share(), one.tokens[:]))

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def forget(self, which: int) -> None:
        one = self.held[which % len(self.held)]
        one.lease.forget()
        own = one.lease.blocks[one.lease.num_shared :]
        assert not any(self.pool.find(key) in own for key in self.known)

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        one = self.held.pop(which % len(self.held))
        one.lease.release()
        assert one.lease.blocks == [] and one.lease.num_tokens == 0
        one.lease.release()  # harmless

    @rule(count=st.integers(1, 2))
    def allocations_fail(self, count: int) -> None:
        self.pool.failures = count

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        held = [block for one in self.held for block in one.lease.blocks]
        assert all(self.pool.ref_count(block) == held.count(block) for block in range(NUM_BLOCKS))

    @invariant()
    def every_lease_reads_its_own_content(self) -> None:
        for one in self.held:
            assert one.lease.num_tokens == len(one.tokens)
            for at in range(len(one.tokens)):
                slot = (one.lease.blocks[at // BLOCK_SIZE], at % BLOCK_SIZE)
                assert self.slots[slot] == tuple(one.tokens[: at + 1])

    @invariant()
    def what_is_found_is_what_its_key_says(self) -> None:
        for key, tokens in self.known.items():
            block = self.pool.find(key)
            if block is not None:
                first = (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
                for at in range(first, len(tokens)):
                    assert self.slots[block, at - first] == tokens[: at + 1]

    @invariant()
    def what_is_announced_is_held_by_who_computes_it(self) -> None:
        computing = {block for one in self.held if one.to_come for block in one.lease.blocks}
        unregistered = {
            block
            for one in self.held
            if len(one.tokens) >= one.lease.register_at
            for block in one.lease.blocks
        }
        assert set(pending_blocks(self.pool)) <= computing | unregistered

    def teardown(self) -> None:
        for one in self.held:
            one.lease.release()
        assert_all_free(self.pool)

    def keys_of(self, tokens: list[int]) -> list[Key]:
        keys = block_keys(tokens)
        for index, key in enumerate(keys):
            self.known[key] = tuple(tokens[: (index + 1) * BLOCK_SIZE])
        return keys

    def copy(self, copies: Copies) -> None:
        read = [
            (destination, offset, self.slots.get((source, offset)))
            for source, destination in copies
            for offset in range(BLOCK_SIZE)
        ]
        for destination, offset, content in read:
            if content is not None:
                self.slots[destination, offset] = content


LeaseModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeaseModel = LeaseModel.TestCase

TOKENS = TEXTS[0]


def assert_all_free(pool: BlockPool) -> None:
    pool.check()
    assert pool.num_free == pool.num_blocks
    assert not pending_blocks(pool)


def filled(pool: BlockPool, num_tokens: int, *, num_blocks: int = 0) -> Lease:
    """A lease on the first of TOKENS, which all have been computed."""
    lease = Lease(pool)
    lease.acquire([], 0, reuse=None, num_blocks=num_blocks)
    lease.extend(num_tokens)
    lease.register(num_tokens, TOKENS)
    return lease


def found(pool: BlockPool, num_blocks: int) -> list[int | None]:
    return [pool.find(key) for key in block_keys(TOKENS[: num_blocks * BLOCK_SIZE])]


def test_rejected_drafts_in_a_block_of_its_own_cost_nothing() -> None:
    pool = BlockPool(4)
    lease = filled(pool, 40, num_blocks=3)
    blocks = list(lease.blocks)
    assert not lease.extend(30)  # drafts that reach into a third block
    lease.rewind(26)
    assert (lease.num_tokens, lease.blocks) == (44, blocks)
    assert not lease.extend(30) and lease.blocks == blocks
    assert found(pool, 1) == blocks[:1]


def test_blocks_that_are_neither_needed_nor_reserved_go() -> None:
    pool = BlockPool(8)
    lease = filled(pool, 100, num_blocks=2)
    assert len(lease.blocks) == 4
    lease.rewind(30)
    assert len(lease.blocks) == 3
    lease.rewind(70)
    assert (lease.num_tokens, len(lease.blocks), pool.num_free) == (0, 2, 6)
    lease.release()
    assert_all_free(pool)


def test_what_was_taken_back_is_found_until_it_is_overwritten() -> None:
    pool = BlockPool(8)
    lease = filled(pool, 70)
    blocks = list(lease.blocks)
    lease.rewind(30)  # into the second block
    assert found(pool, 2) == blocks[:2]
    assert not lease.extend(5)
    assert lease.blocks == blocks[:2]
    assert found(pool, 2) == [blocks[0], None]


def test_a_rewind_into_a_block_that_others_hold_copies_before_it_writes() -> None:
    pool = BlockPool(8)
    lease = filled(pool, 96)
    blocks, other = list(lease.blocks), Lease(pool)
    other.acquire(block_keys(TOKENS[:96]), 96, reuse=96)
    assert other.blocks == blocks
    lease.rewind(50)
    [(source, destination)] = lease.extend(30)
    assert source == blocks[1] and lease.blocks[:2] == [blocks[0], destination]
    assert set(lease.blocks[1:]).isdisjoint(blocks)
    assert found(pool, 3) == other.blocks == blocks


def test_a_reserved_block_that_others_hold_is_replaced_without_a_copy() -> None:
    """Of its tokens none is kept."""
    pool = BlockPool(8)
    lease = filled(pool, 96, num_blocks=3)
    other = lease.share()
    lease.rewind(50)
    [(source, _)] = lease.extend(40)
    assert source == other.blocks[1]
    assert lease.blocks[0] == other.blocks[0]
    assert set(lease.blocks[1:]).isdisjoint(other.blocks)


def test_without_a_block_for_the_copy_nothing_changes() -> None:
    pool = BlockPool(3)
    lease = filled(pool, 40)
    other = lease.share()
    last = filled(pool, 1)
    for one in (lease, other):
        blocks = list(one.blocks)
        with pytest.raises(EngineError, match="KV blocks"):
            one.extend(1)
        assert (one.blocks, one.num_tokens) == (blocks, 40)
    last.release()
    assert len(lease.extend(1)) == 1
    assert not other.extend(1), "it holds its block alone by now"


def test_an_announcement_that_is_taken_back_is_withdrawn() -> None:
    pool = BlockPool(8)
    lease, prompt = Lease(pool), TOKENS[:80]
    lease.acquire(block_keys(prompt), 80, reuse=79, announce=80, num_blocks=3)
    lease.extend(80)
    assert sorted(map(str, pending_blocks(pool))) == sorted(map(str, lease.blocks))
    lease.register(40, prompt)
    lease.rewind(30)  # to 50: neither the second block's content nor the prompt's end will come
    assert pending_blocks(pool) == []
    assert found(pool, 2) == [lease.blocks[0], None]
    lease.release()
    assert_all_free(pool)


def test_nothing_but_a_lease_takes_blocks_or_gives_them_back() -> None:
    """Elsewhere a pool is asked how many are free, and made to grow."""
    folder, used = Path(fastgen.__file__).parent, set[str]()
    for path in [*folder.glob("engine/*.py"), *folder.glob("hf/*.py")]:
        if path.name not in ("blocks.py", "leases.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("pool"):
                    used.add(node.attr)
    assert used == {"num_free", "grow"}
