"""KV splicing, tier 1: bytes that move are the same bytes, all others stay.

Legend: L layers, NB blocks, BS tokens of a block, H heads, D head width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.kernels import (
    KVView,
    SplicePlan,
    plan_append,
    plan_compact,
    plan_fork,
    plan_truncate,
    splice,
)

from .splice_caches import LAYOUTS, Cache, make_cache

BLOCKS = 7
# Sizes that blocks and vectors divide, and sizes that nothing divides.
SHAPES = st.tuples(
    st.integers(1, 2),
    st.just(BLOCKS),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([2, 5]),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def _segments(draw: st.DrawFn, block_size: int) -> np.ndarray:
    """Among ``BLOCKS`` blocks, of which some are read, some written, in any order."""
    order = draw(st.permutations(range(BLOCKS)))
    readable = draw(st.integers(1, BLOCKS))
    rows = []
    for target in order[readable:]:
        at = 0
        while at < block_size:
            tokens = draw(st.integers(0, block_size - at))
            if tokens:
                read = draw(st.sampled_from(order[:readable])) * block_size
                read += draw(st.integers(0, block_size - tokens))
                rows.append((read, target * block_size + at, tokens, -1))
            at += tokens or 1
    return np.array(draw(st.permutations(rows)), np.int32).reshape(-1, 4)


def _moved(before: torch.Tensor, segments: np.ndarray) -> torch.Tensor:
    """Token by token, in Python."""
    after = before.clone()
    for read, written, tokens, _ in segments.tolist():
        for token in range(tokens):
            after[:, :, written + token] = before[:, :, read + token]
    return after


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(LAYOUTS)), SHAPES, DTYPES)
def test_any_segments_in_any_layout(data, layout, shape, dtype):
    cache = make_cache(layout, shape, dtype)
    segments = data.draw(_segments(shape[2]))
    expected = _moved(cache.raw(), segments)
    beside = [_beside(cache, t) for t in cache.storage]
    splice(cache.view, SplicePlan(segments, shape[2]))
    assert torch.equal(cache.raw(), expected)
    for before, storage in zip(beside, cache.storage, strict=True):
        assert torch.equal(before, _beside(cache, storage))


def _beside(cache: Cache, storage: torch.Tensor) -> torch.Tensor:
    """What the storage holds that is not the cache's."""
    inside = torch.zeros(storage.shape, dtype=torch.bool)
    start, size = storage.data_ptr(), storage.element_size()
    for tensor in (*cache.view.keys, *cache.view.values):
        offset = (tensor.data_ptr() - start) // size
        if 0 <= offset < storage.numel():
            inside.view(-1).as_strided(tensor.shape, tensor.stride(), offset).fill_(True)
    return storage[~inside]


def test_numbers_that_are_no_numbers_keep_their_bits():
    cache = make_cache("stacked", (1, 2, 4, 1, 2))
    odd = torch.tensor(
        [0x7FC01234, -0x3FFEDC, 1, -(2**31)], dtype=torch.int32
    )  # NaNs, denormal, -0
    cache.storage[0].view(torch.int32)[0, :, 0] = odd[:, None, None]
    splice(cache.view, SplicePlan(np.array([[0, 4, 4, -1]], np.int32), 4))
    for side in range(2):
        assert torch.equal(cache.storage[0].view(torch.int32)[0, side, 1, :, 0, 1], odd)


# --- builders -------------------------------------------------------------------------------------

BLOCK_SIZE = 4
SHAPE = (2, BLOCKS, BLOCK_SIZE, 2, 8)
EVERY = range(BLOCKS)


def _sequence(raw: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """[L, 2, tokens, H, D]: a block table's tokens in their order."""
    return raw.unflatten(2, (-1, BLOCK_SIZE))[:, :, blocks].flatten(2, 3)


@pytest.fixture
def cache() -> Cache:
    return make_cache("BLNHC", SHAPE)


@pytest.mark.parametrize("at", range(9))
def test_children_have_their_parents_tokens(cache, at):
    before = cache.raw()
    splice(cache.view, plan_fork([5, 1], [0, 3], at, BLOCK_SIZE))
    after = cache.raw()
    for tail in (0, 3):
        child = [*[5, 1][: at // BLOCK_SIZE], tail]
        found = _sequence(after, child)[:, :, :at]
        assert torch.equal(found, _sequence(before, [5, 1])[:, :, :at])
    assert torch.equal(_sequence(after, [1, 2, 4, 5, 6]), _sequence(before, [1, 2, 4, 5, 6]))


def test_a_batch_of_forks_is_one_plan(cache):
    before = cache.raw()
    plan = plan_fork([5], [0], 3, BLOCK_SIZE) + plan_fork([6, 2], [1, 4], 7, BLOCK_SIZE)
    assert (len(plan), plan.tokens) == (3, 9)
    splice(cache.view, plan)
    after = cache.raw()
    for tail, parent in ((0, 5), (1, 2), (4, 2)):
        assert torch.equal(
            _sequence(after, [tail])[:, :, :3], _sequence(before, [parent])[:, :, :3]
        )


def test_appended_tokens_lie_where_the_table_says(cache):
    before = cache.raw()
    dense = make_cache("stacked", (2, 1, 9, 2, 8), seed=1)
    plans = plan_append([4, 0, 2], 3, 6, BLOCK_SIZE, writable=EVERY, source_tokens=9)
    plans += plan_append([3], 0, 2, BLOCK_SIZE, writable={3}, source_tokens=9, source_start=6)
    splice(cache.view, plans, source=dense.view)
    after, new = cache.raw(), dense.raw()
    assert torch.equal(_sequence(after, [4, 0, 2])[:, :, 3:9], new[:, :, :6])
    assert torch.equal(_sequence(after, [3])[:, :, :2], new[:, :, 6:8])
    assert torch.equal(_sequence(after, [4, 0, 2])[:, :, :3], _sequence(before, [4])[:, :, :3])
    assert torch.equal(_sequence(after, [1, 5, 6]), _sequence(before, [1, 5, 6]))


@pytest.mark.parametrize(
    ("at", "writable", "copied"),
    [
        (4, set(), 0),  # a block's end: nobody writes into what stays
        (6, {1}, 0),  # the tail is the sequence's own
        (6, {5}, 2),  # it is not: copy on write
        (6, np.arange(BLOCKS) == 1, 0),
        (0, set(), 0),
    ],
)
def test_truncating_copies_only_what_is_shared(cache, at, writable, copied):
    before = cache.raw()
    plan = plan_truncate([5, 1], at, BLOCK_SIZE, writable=writable, fresh=3)
    assert plan.tokens == copied
    splice(cache.view, plan)
    blocks = [5, 3] if copied else [5, 1]
    assert torch.equal(
        _sequence(cache.raw(), blocks)[:, :, :at], _sequence(before, [5, 1])[:, :, :at]
    )
    assert torch.equal(_sequence(cache.raw(), [5, 1]), _sequence(before, [5, 1]))


def test_compaction_fills_holes_from_the_end(cache):
    before = cache.raw()
    live = np.array([True, False, False, True, False, True, True])
    # Block 2 is free, but its hash would still find it.
    plan, where = plan_compact(live, BLOCK_SIZE, writable={1, 4})
    splice(cache.view, plan)
    assert where.tolist() == [0, 1, 2, 3, 4, 4, 1]
    for block in np.flatnonzero(live).tolist():
        moved = _sequence(cache.raw(), [int(where[block])])
        assert torch.equal(moved, _sequence(before, [block]))
    assert torch.equal(_sequence(cache.raw(), [2]), _sequence(before, [2]))


def test_a_compact_pool_stays(cache):
    plan, where = plan_compact(np.arange(BLOCKS) < 3, BLOCK_SIZE, writable=EVERY)
    assert len(plan) == 0
    assert where.tolist() == list(EVERY)


def test_a_cache_whose_blocks_are_closed_copies_them_whole():
    """vLLM's on CPU: keys are transposed inside a block, so only whole blocks are right."""
    cache = make_cache("LBHNC", SHAPE)
    layers = [t.transpose(1, 2) for t in (cache.storage[0][layer] for layer in range(2))]
    closed = KVView.vllm([t.transpose(1, 2) for t in layers], 8)
    before = cache.raw()
    splice(closed, SplicePlan(np.array([[4, 8, 4, -1]], np.int32), BLOCK_SIZE))
    assert torch.equal(_sequence(cache.raw(), [2]), _sequence(before, [1]))
    with pytest.raises(ValueError, match=r"copies parts of blocks or turns keys, expected whole"):
        splice(closed, plan_fork([1], [2], 3, BLOCK_SIZE))


def test_an_empty_plan_does_nothing(cache):
    before = cache.raw()
    splice(cache.view, plan_fork([5, 1], [], 7, BLOCK_SIZE))
    assert torch.equal(cache.raw(), before)
