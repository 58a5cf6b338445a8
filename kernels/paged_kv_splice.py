"""KV splicing: copy tokens of a paged KV cache, all layers, keys and values, in one launch.

Operations on sequences (fork, append, truncate, move, compact, drop) are builders of plans; this op
runs any plan, and those of a whole batch of requests added up.
"""

from __future__ import annotations

from typing import Literal

import torch

from .paged_kv_splice_plan import SplicePlan
from .paged_kv_splice_reference import splice_reference
from .paged_kv_splice_view import KVView

__all__ = ["splice"]

Impl = Literal["auto", "triton", "reference"]


def splice(
    view: KVView,
    plan: SplicePlan,
    *,
    source: KVView | None = None,
    impl: Impl = "auto",
    approximate: bool = False,
) -> None:
    """Copy what ``plan`` says from ``source`` (default: ``view`` itself) to ``view``, in place.

    Bytes that are copied are the same bytes; keys that are turned are rounded once. On CUDA it runs
    on the current stream and nothing waits for it.

    Args:
        view: the cache that is written.
        plan: from a builder, or several added up.
        source: another cache with the same layers, heads, widths and dtype, in other memory.
        impl: ``triton`` needs CUDA or ``TRITON_INTERPRET=1``; ``auto`` takes it where the cache is
            on CUDA (and not float64) and ``reference`` elsewhere.
        approximate: run a plan although what it leaves behind is not what the model would have
            computed, see ``approx_plan_drop``.

    Raises:
        ValueError: the plan does not fit the views, or may write a slot before it is read; it is
            approximate and that was not asked for.
    """
    _check_source(view, source)
    read = view if source is None else source
    _check_plan(view, read, plan)
    if plan.approximate and not approximate:
        raise ValueError(
            "the plan is approximate: the model would compute other keys and values; expected "
            "approximate=True, or an exact plan"
        )
    triton = _use_triton(impl, view)
    alone = source is None and plan.overlaps()
    if not len(plan):
        return
    if triton:
        from .paged_kv_splice_triton import splice_triton

        splice_triton(view, plan, read, alone=alone)
    else:
        splice_reference(view, plan, read)


def _use_triton(impl: Impl, view: KVView) -> bool:
    double = view.dtype is torch.float64
    if impl == "auto":
        return view.device.type == "cuda" and not double
    if impl == "reference":
        return False
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'triton' or 'reference'")
    if double:
        raise ValueError(
            "impl='triton' got torch.float64, expected float32, bfloat16 or float16: the kernel "
            "turns keys in float32"
        )
    if view.device.type != "cuda":
        from .paged_kv_splice_triton import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"impl='triton' got a cache on {view.device}, expected CUDA (or TRITON_INTERPRET=1 "
                "set before the kernels are imported)"
            )
    return True


def _check_source(view: KVView, source: KVView | None) -> None:
    if source is None:
        return
    if view.shares_memory(source):
        raise ValueError(
            "source shares memory with the view, expected another cache, or None for the view"
        )
    found, expected = (
        (v.layers, v.heads, *v.widths, v.dtype, v.device, v.whole_blocks) for v in (source, view)
    )
    if found != expected:
        raise ValueError(
            f"source has (L, H, DK, DV, dtype, device, whole_blocks) {found}, expected {expected} "
            "like the view"
        )


def _check_plan(view: KVView, read: KVView, plan: SplicePlan) -> None:
    sides = (("read", read, plan.source_block_size), ("written", view, plan.block_size))
    for column, (what, cache, block_size) in enumerate(sides):
        if cache.block_size != block_size:
            raise ValueError(
                f"the cache that is {what} has blocks of {cache.block_size} tokens, expected the "
                f"plan's {block_size}"
            )
        highest = int(plan.segments[:, column].max(initial=-1))
        if highest >= cache.blocks * block_size:
            raise ValueError(
                f"slot {highest} is {what}, expected below {cache.blocks * block_size}, the slots "
                f"of {cache.blocks} blocks"
            )
    partial = plan.segments[:, 2] != view.block_size
    if view.whole_blocks and (plan.rotates or partial.any()):
        raise ValueError(
            "the plan copies parts of blocks or turns keys, expected whole blocks as they are: "
            "inside a block this cache (vLLM's on CPU) has a layout of its own"
        )
    if plan.rope is not None and plan.rotates:
        if plan.rope.width > view.widths[0]:
            raise ValueError(
                f"the rope turns {plan.rope.width} numbers of a key, expected at most its "
                f"{view.widths[0]}"
            )
        if plan.rope.layers and len(plan.rope.layers) != view.layers:
            raise ValueError(
                f"the rope is of {len(plan.rope.layers)} layers, expected the cache's {view.layers}"
            )
