"""Plans of the operations on sequences: from block tables to segments, on the host.

A block table is the sequence's blocks in the order of its tokens: position ``p`` lies in slot
``blocks[p // block_size] * block_size + p % block_size``.

Builders that write to blocks which exist already ask which may be written: ``writable`` is a bool
[NB], or the numbers of such blocks. A block may be written if it has one reference and no hash by
which a prefix cache would hand it to others; any other is refused, whatever the plan.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .paged_kv_splice_plan import PLAIN, Ints, SplicePlan
from .paged_kv_splice_rotation import Rope

__all__ = [
    "Writable",
    "approx_plan_drop",
    "plan_append",
    "plan_compact",
    "plan_fork",
    "plan_move",
    "plan_truncate",
]

Longs = npt.NDArray[np.int64]
_HIGHEST_SLOT = 2**31 - 1

Writable = npt.NDArray[np.bool_] | Collection[int]


class _Run(NamedTuple):
    """Positions ``start ...`` of a block table."""

    name: str
    blocks: Longs
    start: int
    block_size: int

    def slots(self, beyond: Longs) -> Longs:
        """Those of the positions so far behind the start, which ascend.

        Raises:
            ValueError: the table does not reach there.
        """
        positions = self.start + beyond
        if positions[0] < 0 or positions[-1] // self.block_size >= len(self.blocks):
            raise ValueError(
                f"{self.name} are asked for positions {positions[0]} to {positions[-1]}, expected "
                f"within their {len(self.blocks)} blocks of {self.block_size} tokens"
            )
        blocks, offsets = np.divmod(positions, self.block_size)
        return self.blocks[blocks] * self.block_size + offsets


def plan_append(
    blocks: npt.ArrayLike,
    start: int,
    tokens: int,
    block_size: int,
    *,
    writable: Writable,
    source_tokens: int,
    source_start: int = 0,
) -> SplicePlan:
    """Dense keys and values behind a sequence's first ``start`` tokens.

    The dense ones are the ``source`` of the splice, a view of one block:
    ``KVView.stacked(kv[:, :, None])`` for ``kv`` [L, 2, T, H, D].

    Args:
        blocks: the sequence's block table, long enough for ``start + tokens``.
        start: position of the first new token.
        tokens: how many there are.
        block_size: of the paged cache.
        writable: see above.
        source_tokens: T, of all sequences that the dense tensors hold.
        source_start: where this one's begin in them.

    Raises:
        ValueError: the table or the source is too short; a block may not be written.
    """
    dense = _Run("source", np.zeros(1, np.int64), source_start, source_tokens)
    paged = _Run("blocks", _table("blocks", blocks), start, block_size)
    segments = _segments(dense, paged, tokens)
    _check_writable(segments, block_size, writable)
    return SplicePlan(segments, block_size, source_tokens)


def plan_fork(blocks: npt.ArrayLike, tails: npt.ArrayLike, at: int, block_size: int) -> SplicePlan:
    """Children that share a sequence's first ``at`` tokens.

    They share its ``at // block_size`` full blocks, which nobody copies; what is copied is the
    rest, ``at % block_size`` tokens, to one fresh block of each child. Empty where ``at`` is a
    multiple of ``block_size``.

    Args:
        blocks: the parent's block table.
        tails: one freshly allocated block per child.
        at: how many tokens they share.
        block_size: in tokens.

    Raises:
        ValueError: the table is too short; a tail is the parent's, or another child's.
    """
    table, fresh = _table("blocks", blocks), _table("tails", tails)
    taken = set(table.tolist()).intersection(fresh.tolist())
    if taken:
        raise ValueError(
            f"tail {min(taken)} is in the parent's table, expected freshly allocated blocks"
        )
    rest = at % block_size
    parent = _Run("blocks", table, at - rest, block_size)
    if not rest or not len(fresh):
        return _nothing(block_size)
    rows = _rows(parent.slots(np.arange(1)), fresh * block_size, rest)
    return SplicePlan(rows, block_size)


def plan_truncate(
    blocks: npt.ArrayLike,
    at: int,
    block_size: int,
    *,
    writable: Writable,
    fresh: int | None = None,
) -> SplicePlan:
    """A sequence cut to its first ``at`` tokens, so that others can follow.

    Empty, a matter of the table alone, where ``at`` is a multiple of ``block_size`` or the block
    it falls into may be written. Otherwise the ``at % block_size`` tokens that stay are copied to
    ``fresh``, which takes that block's place in the table.

    Args:
        blocks: the sequence's block table.
        at: how many tokens stay.
        block_size: in tokens.
        writable: see above.
        fresh: a freshly allocated block; not looked at where it is not needed.

    Raises:
        ValueError: the table is too short; ``fresh`` is needed and ``None``.
    """
    table = _table("blocks", blocks)
    rest = at % block_size
    if not rest:
        return _nothing(block_size)
    block = int(_Run("blocks", table, at - rest, block_size).slots(np.arange(1))[0]) // block_size
    if _may_write(np.array([block]), writable).all():
        return _nothing(block_size)
    if fresh is None:
        raise ValueError(
            f"block {block} is shared or hashed and holds {rest} of the tokens that stay, expected "
            "a fresh block for them, got None"
        )
    return plan_fork(table, [fresh], at, block_size)


def plan_move(
    blocks: npt.ArrayLike,
    start: int,
    stop: int,
    shift: int,
    block_size: int,
    *,
    rope: Rope,
    writable: Writable,
    into: npt.ArrayLike | None = None,
) -> SplicePlan:
    """Tokens ``start ... stop - 1`` go to positions ``shift`` away; their keys are turned by that.

    Exact to rounding if all that these tokens attended to moves with them; otherwise it is an
    approximation, see :func:`approx_plan_drop`. Each move rounds keys once more: ``MoveCounts``.

    A move to the left may be within the sequence's own blocks; one to the right needs others.
    Where the block table is edited instead (a shift by whole blocks) ``into`` is the edited table:
    keys are turned where they are, and values are not touched.

    Args:
        blocks: the block table that is read.
        start: the first position in it.
        stop: the first that stays behind.
        shift: in tokens; 0 only with ``into``, and turns nothing.
        block_size: in tokens.
        rope: how the model's keys carry positions.
        writable: see above.
        into: the block table that is written; default: ``blocks``.

    Raises:
        ValueError: positions are outside of a table; a block may not be written; ``shift`` is 0
            and there is nothing to do.
    """
    if not shift and into is None:
        raise ValueError("shift is 0 within the same blocks, expected another shift, or `into`")
    if stop < start:
        raise ValueError(f"stop is {stop}, expected at least start = {start}")
    table = _table("blocks", blocks)
    target = table if into is None else _table("into", into)
    segments = _segments(
        _Run("blocks", table, start, block_size),
        _Run("blocks" if into is None else "into", target, start + shift, block_size),
        stop - start,
        0 if shift else PLAIN,
    )
    if not len(segments):
        return _nothing(block_size)
    _check_writable(segments, block_size, writable)
    # Keys that are turned where they are wait for nobody.
    stays = (segments[:, 0] == segments[:, 1]).all()
    lane = None if stays else np.array([0, len(segments)], np.int32)
    if not shift:
        return SplicePlan(segments, block_size, lanes=lane)
    return SplicePlan(segments, block_size, 0, lane, rope, rope.rotations(shift))


def approx_plan_drop(
    blocks: npt.ArrayLike,
    start: int,
    stop: int,
    length: int,
    block_size: int,
    *,
    rope: Rope,
    writable: Writable,
    into: npt.ArrayLike | None = None,
) -> SplicePlan:
    """Cut tokens ``start ... stop - 1`` out of a sequence: what follows them closes the gap.

    **Approximate**: tokens that follow have attended to those that go, so from the second layer on
    their keys and values are other numbers than those of the shortened text. ``splice`` runs such a
    plan only when told to. Exact is to truncate to ``start`` and prefill the rest again.

    Its result must stay out of every shared prefix cache: the hashes of the shortened text belong
    to KV that was computed from it. Take the hashes of all blocks from ``start`` on away, register
    none for the tokens that follow, and where the engine hashes by itself (vLLM, also for blocks
    that a connector loaded) give the request a cache salt of its own. Log-probs sampled behind it
    are not those of the policy on the text: record none for training.

    Args:
        blocks: the sequence's block table.
        start: the first position that goes.
        stop: the first after it that stays.
        length: how many tokens the sequence has; ``length - (stop - start)`` stay.
        block_size: in tokens.
        rope: how the model's keys carry positions.
        writable: see above.
        into: the block table that is written, as in :func:`plan_move`, such as one whose blocks
            from ``start // block_size`` on are fresh; the ``start % block_size`` tokens before the
            gap are then for :func:`plan_truncate` to copy. Default: ``blocks``.

    Raises:
        ValueError: positions are not ``0 <= start < stop <= length``, or outside of the table; a
            block may not be written.
    """
    if not 0 <= start < stop <= length:
        raise ValueError(
            f"start, stop and length are {start}, {stop} and {length}, expected "
            "0 <= start < stop <= length"
        )
    moved = plan_move(
        blocks, stop, length, start - stop, block_size, rope=rope, writable=writable, into=into
    )
    return replace(moved, approximate=True)


def plan_compact(
    live: npt.ArrayLike, block_size: int, *, writable: Writable
) -> tuple[SplicePlan, Ints]:
    """Whole blocks from the end of the pool into holes at its beginning; positions stay.

    What for: giving memory back, or a larger pool's view. The caller edits every block table, and
    moves references and hashes along.

    Args:
        live: bool [NB], the blocks that hold anything.
        block_size: in tokens.
        writable: see above; holes are blocks that are not live and may be written.

    Returns:
        The plan, and int32 [NB]: where each block is afterwards.

    Raises:
        ValueError: ``live`` is no such array.
    """
    held = np.asarray(live)
    if held.ndim != 1 or held.dtype != np.bool_:
        raise ValueError(f"live is {held.dtype} of shape {held.shape}, expected bool (NB,)")
    used = np.flatnonzero(held)
    free = np.flatnonzero(~held & _may_write(np.arange(len(held)), writable))
    # The lowest holes and the highest blocks, until they meet.
    pairs = min(len(used), len(free))
    holes, last = free[:pairs], used[::-1][:pairs]
    gain = holes < last
    holes, last = holes[gain], last[gain]
    where = np.arange(len(held), dtype=np.int32)
    where[last] = holes
    rows = _rows(last * block_size, holes * block_size, block_size)
    return SplicePlan(rows, block_size), where


def _nothing(block_size: int) -> SplicePlan:
    return SplicePlan(np.empty((0, 4), np.int32), block_size)


def _table(name: str, blocks: npt.ArrayLike) -> Longs:
    table = np.asarray(blocks)
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} are {table.dtype} of shape {table.shape}, expected a list of block numbers"
        )
    if (table < 0).any():
        raise ValueError(f"{name} have block {table.min()}, expected at least 0")
    return table.astype(np.int64)


def _segments(source: _Run, destination: _Run, tokens: int, rotation: int = PLAIN) -> Ints:
    """``tokens`` in a row on both sides, cut wherever either side's block ends."""
    if tokens < 1:
        return np.empty((0, 4), np.int32)
    sides = (source, destination)
    cuts = [np.arange(-side.start % side.block_size, tokens, side.block_size) for side in sides]
    starts = np.unique(np.concatenate([[0], *cuts]))
    for side in sides:
        side.slots(np.array([0, tokens - 1]))
    read, written = (side.slots(starts) for side in sides)
    return _rows(read, written, np.diff(starts, append=tokens), rotation)


def _rows(read: Longs, written: Longs, tokens: Longs | int, rotation: int = PLAIN) -> Ints:
    highest = max(read.max(initial=0), written.max(initial=0))
    if highest > _HIGHEST_SLOT:
        raise ValueError(f"slot {highest} is asked for, expected below 2^31")
    rows = np.empty((len(written), 4), np.int32)
    for column, values in enumerate((read, written, tokens, rotation)):
        rows[:, column] = values
    return rows


def _may_write(blocks: Longs, writable: Writable) -> npt.NDArray[np.bool_]:
    if isinstance(writable, np.ndarray):
        if writable.dtype != np.bool_ or writable.ndim != 1:
            raise ValueError(
                f"writable is {writable.dtype} of shape {writable.shape}, expected bool (NB,) or "
                "a collection of block numbers"
            )
        if blocks.size and blocks.max() >= len(writable):
            raise ValueError(
                f"writable is of {len(writable)} blocks, expected it to say about {blocks.max()}"
            )
        return writable[blocks]
    return np.isin(blocks, np.fromiter(writable, np.int64))


def _check_writable(segments: Ints, block_size: int, writable: Writable) -> None:
    blocks = np.unique(segments[:, 1].astype(np.int64) // block_size)
    allowed = _may_write(blocks, writable)
    if not allowed.all():
        raise ValueError(
            f"block {blocks[~allowed][0]} would be written and has more than one reference or a "
            "registered hash, expected one of `writable`"
        )
