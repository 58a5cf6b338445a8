"""KV splicing: copy tokens of a paged KV cache, all layers, keys and values, in one launch.

The operations on sequences (fork, append, truncate, move ...) are builders of plans; this op runs
any plan, and plans of a whole batch of requests added up.
"""

from __future__ import annotations

from typing import Literal

from .paged_kv_splice_plan import SplicePlan, check_disjoint
from .paged_kv_splice_reference import splice_reference
from .paged_kv_splice_view import KVView

__all__ = ["splice"]

Impl = Literal["auto", "reference"]


def splice(
    view: KVView, plan: SplicePlan, *, source: KVView | None = None, impl: Impl = "auto"
) -> None:
    """Copy what ``plan`` says from ``source`` (default: ``view`` itself) to ``view``, in place.

    Args:
        view: the cache that is written.
        plan: from a builder, or several added up.
        source: another cache with the same layers, heads, widths and dtype, in other memory.
        impl: ``auto`` or ``reference``.

    Raises:
        ValueError: the plan does not fit the views, or reads what it writes.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl is {impl!r}, expected 'auto' or 'reference'")
    _check_source(view, source)
    read = view if source is None else source
    _check_slots("written", view, plan.block_size, plan, 1)
    _check_slots("read", read, plan.source_block_size, plan, 0)
    if not len(plan):
        return
    if source is None:
        check_disjoint(plan)
    splice_reference(view, plan, read)


def _check_source(view: KVView, source: KVView | None) -> None:
    if source is None:
        return
    if view.shares_memory(source):
        raise ValueError(
            "source shares memory with the view, expected another cache, or None for the view"
        )
    found, expected = (
        (
            v.layers,
            *(t.shape[2:] for t in (v.keys[0], v.values[0])),
            v.dtype,
            v.device,
        )
        for v in (source, view)
    )
    if found != expected:
        raise ValueError(
            f"source has (layers, (H, DK), (H, DV), dtype, device) {found}, expected {expected} "
            "like the view"
        )


def _check_slots(
    what: str, view: KVView, block_size: int | None, plan: SplicePlan, column: int
) -> None:
    if view.block_size != block_size:
        raise ValueError(
            f"the cache that is {what} has blocks of {view.block_size} tokens, expected the "
            f"plan's {block_size}"
        )
    slots = view.blocks * view.block_size
    highest = int(plan.segments[:, column].max(initial=-1))
    if highest >= slots:
        raise ValueError(
            f"slot {highest} is {what}, expected below the {slots} slots of {view.blocks} blocks"
        )
