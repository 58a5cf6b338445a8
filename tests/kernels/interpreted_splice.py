"""The splice's Triton kernel under Triton's interpreter; started by test_triton_interpreter.py.

The interpreter cannot show races, so nothing here says that an overlapping plan is safe on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from thor_fast.kernels import Rope, SplicePlan, plan_append, plan_fork, plan_move, splice
from thor_fast.kernels.paged_kv_splice_triton import INTERPRETED

from .splice_caches import LAYOUTS, make_cache
from .under_interpreter import SCALARS_OF_ARRAYS

pytestmark = SCALARS_OF_ARRAYS

EVERY = range(7)
SHAPE = (2, 7, 4, 2, 12)
FOUR = tuple(10.0 ** -np.arange(4.0))
ROPES = {
    "partial": Rope((FOUR,)),
    "neighbours": Rope((FOUR,), interleaved=True),
    "whole": Rope(((1.0, 0.5, 0.2, 0.1, 0.03, 0.01),)),
    "whole, neighbours": Rope(((1.0, 0.5, 0.2, 0.1, 0.03, 0.01),), interleaved=True),
    "by layer": Rope((FOUR, FOUR[::-1]), (1, 0)),
    "not in layer 0": Rope((FOUR,), (-1, 0)),
}


def test_the_interpreter_is_on():
    assert INTERPRETED


def _both(make: Callable[[], tuple], plan: SplicePlan, **settings: object) -> list[torch.Tensor]:
    results = []
    for impl in ("triton", "reference"):
        cache, source = make()
        splice(cache.view, plan, source=source, impl=impl, **settings)
        results.append(cache.read().clone())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement_is_the_twins_bit_by_bit(layout, dtype):
    plan = plan_fork([5, 1], [0, 3], 7, 4) + plan_fork([6], [2], 1, 4)
    triton, twin = _both(lambda: (make_cache(layout, SHAPE, dtype), None), plan)
    assert torch.equal(triton, twin)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("layout", ["stacked", "BLHNC", "slices"])
def test_turned_keys_are_the_twins(layout, name):
    """Among them one move out of place, one over itself, one where it stands, and a plain copy."""
    rope = ROPES[name]
    plans = [
        plan_move([0], 0, 3, 1000, 4, rope=rope, writable=EVERY, into=[*[9] * 250, 1]),
        plan_move([2, 3], 1, 7, -1, 4, rope=rope, writable=EVERY),
        plan_move([6, 4], 4, 7, -4, 4, rope=rope, writable=EVERY, into=[4]),
        plan_fork([6], [5], 3, 4),
    ]
    plan = sum(plans[1:], start=plans[0])
    triton, twin = _both(lambda: (make_cache(layout, SHAPE), None), plan)
    torch.testing.assert_close(triton, twin, rtol=1e-6, atol=1e-6)
    assert torch.equal(triton[:, 1], twin[:, 1])


def test_halves_are_turned_in_float32():
    plan = plan_move([2, 3], 1, 7, -1, 4, rope=ROPES["whole"], writable=EVERY)
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        triton, twin = _both(lambda kind=dtype: (make_cache("stacked", SHAPE, kind), None), plan)
        # The interpreter truncates bfloat16, where the twin rounds.
        bound = 2.0 ** (1 - bits) * triton.abs().max()
        assert float((triton.double() - twin.double()).abs().max()) <= bound


def test_another_cache_with_other_blocks():
    plan = plan_append([4, 0, 2], 3, 6, 4, writable=EVERY, source_tokens=9)

    def make() -> tuple:
        return make_cache("BHLNC", SHAPE), make_cache("stacked", (2, 1, 9, 2, 12), seed=1).view

    triton, twin = _both(make, plan)
    assert torch.equal(triton, twin)


def test_a_segment_longer_than_a_tile():
    """One lane and one head walk 4,100 tokens, in several tiles."""
    shape = (1, 2, 4100, 2, 2)
    plan = plan_move([0], 3, 4100, -3, 4100, rope=Rope(((0.5,),)), writable={0})
    triton, twin = _both(lambda: (make_cache("stacked", shape), None), plan)
    torch.testing.assert_close(triton, twin, rtol=1e-6, atol=1e-6)
