"""The splice on a GPU, where it is meant to run: what no interpreter can show.

Legend: L layers, NB blocks, BS tokens of a block, H heads, D head width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thor_fast.kernels import KVView, Rope, SplicePlan, plan_append, plan_fork, plan_move, splice

from .splice_caches import LAYOUTS, Cache, make_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BLOCKS, BLOCK_SIZE = 64, 16
EVERY = range(BLOCKS)
# Each is a specialisation to compile. Widths that vectors divide, and one that they do not.
NUMBERS = [
    (128, torch.bfloat16),
    (80, torch.bfloat16),
    (6, torch.float16),
    (64, torch.float32),
]


def caches(layout: str, width: int, dtype: torch.dtype) -> tuple[Cache, Cache]:
    shape = (2, BLOCKS, BLOCK_SIZE, 4, width)
    one, other = (make_cache(layout, shape, dtype, device="cuda") for _ in range(2))
    return one, other


def rope(width: int, *, interleaved: bool = False) -> Rope:
    return Rope((tuple(1e4 ** -(np.arange(width // 2) / (width / 2))),), interleaved=interleaved)


@pytest.mark.parametrize(("width", "dtype"), NUMBERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement_is_byte_exact(layout, width, dtype):
    triton, twin = caches(layout, width, dtype)
    plans = [plan_fork([0, 1, 2], [3 + i], 33 + i, BLOCK_SIZE) for i in range(15)]
    plan = sum(plans[1:], start=plans[0])
    splice(triton.view, plan, impl="triton")
    splice(twin.view, plan, impl="reference")
    for one, other in zip(triton.storage, twin.storage, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "dtype"), NUMBERS)
@pytest.mark.parametrize("layout", ["stacked", "BLHNC"])
def test_turned_keys_are_the_twins_to_rounding(layout, width, dtype, interleaved):
    into = [*[9] * 5, *range(20, 30)]
    for turned in (width, 2 * (width // 4)):
        turns = rope(turned, interleaved=interleaved)
        triton, twin = caches(layout, width, dtype)
        plan = plan_move(range(10), 3, 155, 83, BLOCK_SIZE, rope=turns, writable=EVERY, into=into)
        splice(triton.view, plan, impl="triton")
        splice(twin.view, plan, impl="reference")
        # A product that is fused with a sum is rounded once less: at most one unit apart.
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(triton.read(), twin.read(), rtol=rtol, atol=1e-5)
        assert torch.equal(triton.read()[:, 1], twin.read()[:, 1])


@pytest.mark.parametrize("shift", [-1, -5, -16, -33])
@pytest.mark.parametrize("layout", ["pools", "LBNHC", "BHLNC"])
def test_a_move_over_itself_is_no_race(layout, shift):
    """Every lane reads what it is about to overwrite; repeated, since races depend on luck."""
    blocks = np.random.default_rng(0).permutation(BLOCKS)
    turns = rope(64)
    for _ in range(5):
        triton, twin = caches(layout, 128, torch.bfloat16)
        plan = plan_move(
            blocks, 40, BLOCKS * BLOCK_SIZE, shift, BLOCK_SIZE, rope=turns, writable=EVERY
        )
        splice(triton.view, plan, impl="triton")
        splice(twin.view, plan, impl="reference")
        torch.testing.assert_close(triton.read(), twin.read(), rtol=2.0**-7, atol=1e-5)
        assert torch.equal(triton.read()[:, 1], twin.read()[:, 1])


def test_keys_are_turned_where_they_are():
    triton, twin = caches("BLNHC", 128, torch.bfloat16)
    values = triton.read()[:, 1].clone()
    plan = plan_move(
        [5, 6], 0, 30, 32, BLOCK_SIZE, rope=rope(128), writable=EVERY, into=[9, 9, 5, 6]
    )
    splice(triton.view, plan)
    splice(twin.view, plan, impl="reference")
    assert torch.equal(triton.read()[:, 1], values)
    torch.testing.assert_close(triton.read(), twin.read(), rtol=2.0**-7, atol=1e-5)


def test_appending_from_another_cache():
    triton, twin = caches("BHLNC", 64, torch.bfloat16)
    dense = torch.randn(2, 2, 37, 4, 64, device="cuda").bfloat16()
    plan = plan_append([4, 0, 2], 5, 35, BLOCK_SIZE, writable=EVERY, source_tokens=37)
    for cache, impl in ((triton, "triton"), (twin, "reference")):
        splice(cache.view, plan, source=KVView.stacked(dense[:, :, None]), impl=impl)
    assert torch.equal(triton.read(), twin.read())


def test_the_host_waits_for_nothing():
    cache, _ = caches("BLNHC", 128, torch.bfloat16)
    plan = plan_fork([0], [1, 2], 7, BLOCK_SIZE)
    splice(cache.view, plan)  # compiles, and fills the allocators
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        splice(cache.view, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cache.read()[:, :, 1, :7], cache.read()[:, :, 0, :7])


def test_slots_beyond_two_to_the_31_numbers():
    """Offsets are 64 bits wide: a pool passes 2^31 numbers at 4 GiB."""
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, expected 8")
    kv = torch.zeros(1, 2, 70_000, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
    kv[:, :, -1] = 1.0
    segments = np.array([[69_999 * 16, 69_998 * 16, 16, -1]], np.int32)
    splice(KVView.stacked(kv), SplicePlan(segments, 16))
    assert bool((kv[:, :, -2:] == 1.0).all())
    assert not kv[:, :, :-2].any()
