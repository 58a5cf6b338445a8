"""The connector's books without vLLM: references, order of eviction, and who may share what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.engines.vllm_calls import PinNames
from thor_fast.engines.vllm_pins import Pin, PinTable


class Pool:
    """Counts references as vLLM's block pool does; blocks are their numbers."""

    def __init__(self, n_blocks: int) -> None:
        self.references = [0] * n_blocks
        self.evictable: list[int] = []

    def touch(self, blocks) -> None:
        for block in blocks:
            self.references[block] += 1

    def free_blocks(self, ordered_blocks) -> None:
        for block in ordered_blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0
            if not self.references[block]:
                self.evictable.append(block)

    def get_num_free_blocks(self) -> int:
        return self.references.count(0)


def pin(*blocks: int) -> Pin:
    return Pin(tuple(range(4 * len(blocks))), blocks, "w0")


@pytest.mark.parametrize(
    ("tokens", "salt", "shared"),
    [
        ([1, 2, 3, 4, 5, 6], "w0", 5),
        ([1, 2, 3, 4, 5], "w0", 4),  # the logits after the last token are not kept
        ([1, 2, 9, 4, 5, 6], "w0", 2),
        ([9, 2, 3], "w0", 0),
        ([1], "w0", 0),
        ([1, 2, 3, 4, 5, 6], "w1", 0),
        ([1, 2, 3, 4, 5, 6], None, 0),
    ],
)
def test_what_a_request_shares_with_a_pin(tokens, salt, shared) -> None:
    assert Pin((1, 2, 3, 4, 5), (0, 1), "w0").shared(tokens, salt) == shared


def test_the_tail_is_given_back_first() -> None:
    pool = Pool(4)
    table = PinTable(pool)
    table.add("a", pin(2, 0, 3))
    assert pool.references == [1, 0, 1, 1]
    table.drop(["a", "never there"])
    assert pool.evictable == [3, 0, 2]


def test_a_pin_of_the_same_name_takes_over_shared_blocks() -> None:
    pool = Pool(4)
    table = PinTable(pool)
    table.add("a", pin(0, 1))
    table.add("a", pin(0, 2))
    assert pool.references == [1, 0, 1, 0]
    assert pool.evictable == [1]  # block 0 was never free, so nobody could have taken it
    table.clear()
    assert (len(table), pool.references) == (0, [0] * 4)


def test_spent_ones_make_room_first() -> None:
    pool = Pool(6)
    table = PinTable(pool)
    for i, name in enumerate("abc"):
        table.add(name, pin(2 * i, 2 * i + 1))
    table.spend("c")
    table.spend("never there")
    assert table.make_room(2, only_spent=True)
    assert pool.references == [1, 1, 1, 1, 0, 0]
    assert not table.make_room(3, only_spent=True)
    table.spend("b")
    assert table.use("b") is not None  # somebody starts there again
    assert table.make_room(4)
    assert pool.references == [0, 0, 1, 1, 0, 0]


def test_a_pin_with_one_session_left_is_its_own() -> None:
    names = PinNames()
    assert names.only_one(None)
    names.hold("a")
    assert names.only_one("a")
    names.hold("a")
    assert not names.only_one("a")


def test_the_least_recently_used_make_room() -> None:
    pool = Pool(6)
    table = PinTable(pool)
    for i, name in enumerate("abc"):
        table.add(name, pin(2 * i, 2 * i + 1))
    used = table.use("a")
    assert used is not None
    assert used.blocks == (0, 1)
    assert not table.make_room(0)
    assert table.make_room(1, keep={"b"})
    assert [table.use(name) is None for name in "abc"] == [False, False, True]
    assert table.make_room(100)
    assert not table.make_room(100)
    assert len(table) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "drop", "use", "room"]),
            st.sampled_from("abcd"),
            st.lists(st.integers(0, 7), unique=True, max_size=4),
        ),
        max_size=40,
    )
)
def test_every_block_has_as_many_references_as_pins(operations) -> None:
    pool = Pool(8)
    table = PinTable(pool)
    for operation, name, blocks in operations:
        match operation:
            case "add":
                table.add(name, pin(*blocks))
            case "drop":
                table.drop([name])
            case "use":
                table.use(name)
            case "room":
                table.make_room(len(blocks), keep={name})
                kept = table.use(name)
                assert len(table) == (kept is not None) or pool.get_num_free_blocks() >= len(blocks)
        held = [pinned for n in "abcd" if (pinned := table.use(n)) is not None]
        assert len(held) == len(table)
        expected = [sum(block in pinned.blocks for pinned in held) for block in range(8)]
        assert pool.references == expected


def test_a_pin_is_dropped_when_the_last_session_lets_go() -> None:
    names = PinNames()
    parent = SimpleNamespace(pin=names.hold("p"))
    children = [names.hold(parent.pin) for _ in range(2)]
    for name in (parent.pin, children[0]):
        names.release(name)
    assert names.take_unused() == []
    names.release(children[1])
    assert names.take_unused() == ["p"]
    assert names.take_unused() == []
    assert names.hold(None) is None
    names.release(None)
    names.release(names.hold("q"))
    names.clear()
    assert names.take_unused() == []
