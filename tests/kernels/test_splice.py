"""KV splicing, tier 1: bytes that move are the same bytes, all others stay."""

from __future__ import annotations

import pytest
import torch

from thor_fast.kernels import KVView, SplicePlan, plan_append, plan_fork, splice

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, WIDTH = 2, 6, 4, 2, 8


@pytest.fixture
def cache() -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(LAYERS, 2, BLOCKS, BLOCK_SIZE, HEADS, WIDTH, generator=gen)


def test_a_fork_copies_the_tail_and_nothing_else(cache):
    before = cache.clone()
    plan = plan_fork([5, 1], [0, 3], at=7, block_size=BLOCK_SIZE)
    splice(KVView.stacked(cache), plan)
    for tail in (0, 3):
        assert torch.equal(cache[:, :, tail, :3], before[:, :, 1, :3])
        assert torch.equal(cache[:, :, tail, 3:], before[:, :, tail, 3:])
    assert torch.equal(cache[:, :, [1, 2, 4, 5]], before[:, :, [1, 2, 4, 5]])


def test_a_fork_at_a_blocks_end_copies_nothing():
    assert len(plan_fork([5, 1], [0, 3], at=8, block_size=BLOCK_SIZE)) == 0


def test_appended_tokens_lie_where_the_table_says(cache):
    before = cache.clone()
    dense = torch.randn(LAYERS, 2, 9, HEADS, WIDTH)
    plan = plan_append([4, 0, 2], 3, 6, BLOCK_SIZE, source_tokens=9, source_start=2)
    assert isinstance(plan, SplicePlan)
    splice(KVView.stacked(cache), plan, source=KVView.stacked(dense[:, :, None]))
    sequence = cache[:, :, [4, 0, 2]].flatten(2, 3)
    assert torch.equal(sequence[:, :, 3:9], dense[:, :, 2:8])
    assert torch.equal(sequence[:, :, :3], before[:, :, 4, :3])
    assert torch.equal(cache[:, :, [1, 3, 5]], before[:, :, [1, 3, 5]])
    assert torch.equal(sequence[:, :, 9:], before[:, :, 2, 1:])


def test_what_is_read_is_not_written(cache):
    plans = plan_fork([5], [0], 3, BLOCK_SIZE) + plan_fork([0], [1], 2, BLOCK_SIZE)
    message = r"segment 1 reads slots 0 to 1, which segment 0 writes, expected sources and"
    with pytest.raises(ValueError, match=message):
        splice(KVView.stacked(cache), plans)
