"""Block tables under random operations, checked against what each position must hold.

The KV pool is played by a dictionary: what a position holds is named by the version of the weights
and by all tokens up to it, so a block that is shared, copied, kept or found wrongly shows.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from thor_fast.engines.blocks import BlockPool, chain_key, root_key
from thor_fast.engines.sessions import Session, SessionTable
from thor_fast.errors import EngineError

SIZE, BLOCKS, LONGEST = 4, 12, 40


class Play:
    """A session table, and a pool whose content can be looked at."""

    def __init__(self) -> None:
        self.pool = BlockPool(BLOCKS)
        self.table = SessionTable(self.pool, SIZE)
        self.content: dict[tuple[int, int], object] = {}
        self.sessions: dict[str, Session] = {}
        self.version = 0
        self.admitted = self.refused = 0

    def _write(self, session: Session, n: int) -> None:
        """What the engine does in a step: copies, then the writes of ``n`` positions."""
        start = session.cached
        self.table.advance(session, n)
        for copy in self.table.take_copies():
            assert copy.target not in {c for s in self.others(session) for c in s.blocks}
            for offset in range(copy.tokens):
                self.content[copy.target, offset] = self.content[copy.source, offset]
        for p in range(start, start + n):
            block = session.blocks[p // SIZE]
            assert self.pool.holders(block) == 1
            self.content[block, p % SIZE] = (self.version, tuple(session.ids[: p + 1]))

    def others(self, session: Session) -> list[Session]:
        return [s for s in self.sessions.values() if s is not session]

    def call(self, name: str, keep: int, new: list[int], sampled: int, evict: bool) -> None:
        """A whole ``generate`` call, with the other sessions idle."""
        session = self.sessions.setdefault(name, self.table.open(name))
        ids = [*session.ids[:keep], *new][: LONGEST - 1]
        self.table.touch(session, busy=True)
        missing = self.table.admit(session, ids, evict=evict)
        if missing is None:
            self.refused += 1
            assert not evict
        else:
            self.admitted += 1
            assert 1 <= missing == len(ids) - session.cached
            self._write(session, missing)
            for token in range(sampled):
                if len(session.ids) >= LONGEST:
                    break
                session.ids.append(token % 3)
                assert self.table.reserve(session, len(session.ids), evict=True)
                self._write(session, 1)
        self.table.touch(session, busy=False)

    def fork(self, name: str, n: int, at: int) -> None:
        parent = self.sessions[name]
        for child in self.table.fork(name, n, at % (len(parent.ids) + 1)):
            self.sessions[child] = self.table.open(child)

    def release(self, name: str) -> None:
        self.table.release(name)
        del self.sessions[name]

    def reweight(self) -> None:
        self.version += 1
        self.table.invalidate(self.version)
        assert self.pool.available == BLOCKS

    def check(self) -> None:
        held = Counter(block for s in self.sessions.values() for block in s.blocks)
        assert all(held[block] == self.pool.holders(block) for block in range(BLOCKS))
        assert self.pool.available == BLOCKS - len(held)
        assert self.table.live[1] == len(held) * SIZE
        for session in self.sessions.values():
            assert session.cached <= len(session.ids)
            assert len(session.blocks) >= -(-session.cached // SIZE)
            assert len(session.keys) == session.cached // SIZE
            for p in range(session.cached):
                expected = (self.version, tuple(session.ids[: p + 1]))
                assert self.content[session.blocks[p // SIZE], p % SIZE] == expected


def test_ten_thousand_operations_leak_no_block() -> None:
    rng = np.random.default_rng(20)
    play = Play()
    for _ in range(10_000):
        names = sorted(play.sessions)
        name = names[rng.integers(len(names))] if names else "s"
        kind = rng.random()
        if not names or len(names) < 2 or kind < 0.5:
            if kind < 0.15 or not names:
                name = f"s{rng.integers(6)}"
            length = len(play.sessions[name].ids) if name in play.sessions else 0
            # Few different tokens: sessions often begin alike.
            new = rng.integers(0, 2, rng.integers(1, 12)).tolist()
            keep = int(rng.integers(length + 1))
            play.call(name, keep, new, int(rng.integers(9)), bool(rng.random() < 0.7))
        elif kind < 0.65 and len(names) < 12:
            play.fork(name, int(rng.integers(1, 4)), int(rng.integers(LONGEST)))
        elif kind < 0.8:
            play.table.truncate(name, int(rng.integers(len(play.sessions[name].ids) + 1)))
        elif kind < 0.99:
            play.release(name)
        else:
            play.reweight()
        play.check()
    assert play.table.evictions > 100
    assert play.table.prefix_tokens > 1000
    assert min(play.admitted, play.refused) > 100
    for name in list(play.sessions):
        play.release(name)
    assert play.pool.available == BLOCKS
    assert sorted(play.pool.take() for _ in range(BLOCKS)) == list(range(BLOCKS))


class Sessions(RuleBasedStateMachine):
    """The same, found and shrunk by hypothesis."""

    def __init__(self) -> None:
        super().__init__()
        self.play = Play()

    def _some(self, which: int) -> str | None:
        names = sorted(self.play.sessions)
        return names[which % len(names)] if names else None

    @rule(
        which=st.integers(0, 3),
        keep=st.integers(0, LONGEST),
        new=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        sampled=st.integers(0, 8),
        evict=st.booleans(),
    )
    def call(self, which: int, keep: int, new: list[int], sampled: int, evict: bool) -> None:
        name = self._some(which) if evict else None  # a fork, too
        self.play.call(name or f"s{which}", keep, new, sampled, evict)

    @rule(which=st.integers(0, 7), n=st.integers(1, 3), at=st.integers(0, LONGEST))
    def fork(self, which: int, n: int, at: int) -> None:
        name = self._some(which)
        if name is not None and len(self.play.sessions) < 12:
            self.play.fork(name, n, at)

    @rule(which=st.integers(0, 7), at=st.integers(0, LONGEST))
    def truncate(self, which: int, at: int) -> None:
        name = self._some(which)
        if name is not None:
            self.play.table.truncate(name, at % (len(self.play.sessions[name].ids) + 1))

    @rule(which=st.integers(0, 7))
    def release(self, which: int) -> None:
        name = self._some(which)
        if name is not None:
            self.play.release(name)

    @rule()
    def reweight(self) -> None:
        self.play.reweight()

    @invariant()
    def holds(self) -> None:
        self.play.check()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=100, stateful_step_count=20, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_prefix_is_found_until_the_weights_change() -> None:
    play = Play()
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    play.call("a", 0, ids, 0, True)
    play.release("a")
    assert play.pool.available == BLOCKS
    play.call("b", 0, [*ids[:8], 3, 3, 3], 0, True)
    assert play.table.prefix_tokens == 8
    # A context that is cached to its end is computed from its last block on.
    play.call("c", 0, ids[:8], 0, True)
    assert play.table.prefix_tokens == 8 + 4
    assert play.table.live[1] == 4 * SIZE
    play.reweight()
    play.call("d", 0, ids, 0, True)
    assert play.table.prefix_tokens == 12


def test_cached_blocks_go_from_the_end_of_the_longest_unused_chain() -> None:
    play = Play()
    play.call("old", 0, [0] * 12, 0, True)
    play.call("new", 0, [1] * 12, 0, True)
    play.release("old")
    play.release("new")
    play.call("big", 0, [2] * 27, 0, True)  # 7 blocks of 12, 6 of which are free
    play.call("old2", 0, [0] * 13, 0, True)
    assert play.table.prefix_tokens == 8


def test_an_idle_session_gives_way_before_a_waiting_one_and_a_running_one_never() -> None:
    play = Play()
    for name in ("running", "waiting", "idle"):
        play.call(name, 0, [ord(name[0])] * 15, 0, True)
    play.sessions["running"].running = play.sessions["running"].busy = True
    play.sessions["waiting"].busy = True
    play.call("new", 0, [9] * 7, 0, True)
    assert not play.sessions["idle"].blocks
    assert play.sessions["waiting"].blocks
    play.call("newer", 0, [8] * 23, 0, True)
    assert not play.sessions["waiting"].blocks
    play.call("more", 0, [7] * 39, 0, False)
    assert play.refused == 1
    assert not play.sessions["more"].blocks
    assert play.sessions["running"].blocks
    assert play.table.evictions == 3


def test_a_lone_holder_writes_in_place_and_the_key_is_gone() -> None:
    play = Play()
    play.call("a", 0, [5] * 8, 0, True)
    key = chain_key(root_key(0), [5] * 4)
    block = play.sessions["a"].blocks[0]
    assert play.pool.find(key) == block
    play.table.truncate("a", 2)
    play.call("a", 2, [6], 0, True)
    assert play.sessions["a"].blocks == [block]
    assert play.pool.find(key) is None
    play.check()


def test_kv_that_is_not_finite_is_found_by_nobody() -> None:
    play = Play()
    play.call("a", 0, [5] * 10, 0, True)
    play.fork("a", 1, 5)
    blocks = play.sessions["a"].blocks[:]
    assert play.table.spoil(play.sessions["a"]) == blocks[2:]
    play.call("b", 0, [5] * 10, 0, True)
    assert play.table.prefix_tokens == 0


def test_keys_depend_on_everything_before_and_on_the_version() -> None:
    def key(version: int, *blocks: list[int]) -> bytes:
        chain = root_key(version)
        for block in blocks:
            chain = chain_key(chain, block)
        return chain

    keys = [key(0, [1, 2], [3, 4]), key(0, [1, 2, 3, 4]), key(0, [3, 4]), key(1, [1, 2], [3, 4])]
    keys += [key(0, [1, 3], [3, 4]), key(10), key(1, [0])]
    assert len(set(keys)) == len(keys)
    assert key(0, [1, 2], [3, 4]) == keys[0]


def test_a_pool_says_what_it_expected() -> None:
    pool = BlockPool(2)
    first = pool.take()
    with pytest.raises(EngineError, match="block 1 is free, expected one that is held or cached"):
        pool.share(1)
    with pytest.raises(EngineError, match="block 1 has no holder, expected at least one"):
        pool.give_back(1)
    with pytest.raises(EngineError, match="block 1 has 0 holders and no key, expected a holder"):
        pool.set_key(1, b"x")
    pool.set_key(first, b"x")
    with pytest.raises(EngineError, match="block 0 has 1 holders and a key, expected a holder"):
        pool.set_key(first, b"y")
    second = pool.take()
    with pytest.raises(EngineError, match="all 2 KV blocks are held, expected one to take"):
        pool.take()
    pool.set_key(second, b"x")
    assert pool.find(b"x") == first
    pool.forget_key(first)
    assert pool.find(b"x") is None
