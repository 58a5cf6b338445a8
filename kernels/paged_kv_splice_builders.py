"""Plans of the operations on sequences: from block tables to segments, on the host.

A block table is the sequence's blocks in the order of its tokens: position ``p`` lies in slot
``blocks[p // block_size] * block_size + p % block_size``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .paged_kv_splice_plan import PLAIN, Ints, SplicePlan

__all__ = ["plan_append", "plan_fork"]


def plan_append(
    blocks: npt.ArrayLike,
    start: int,
    tokens: int,
    block_size: int,
    *,
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
        source_tokens: T, of all sequences that the dense tensors hold.
        source_start: where this one's begin in them.

    Raises:
        ValueError: the table or the source is too short.
    """
    if source_start < 0 or source_start + tokens > source_tokens:
        raise ValueError(
            f"tokens {source_start} to {source_start + tokens - 1} of the source are asked for, "
            f"expected within its {source_tokens}"
        )
    table = _table("blocks", blocks)
    segments = _segments(
        (np.zeros(1, np.int64), source_start, source_tokens), (table, start, block_size), tokens
    )
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
    rest = at % block_size
    taken = np.isin(fresh, table)
    if taken.any():
        raise ValueError(
            f"tail {fresh[taken][0]} is in the parent's table, expected freshly allocated blocks"
        )
    if not rest or not len(fresh):
        return SplicePlan(np.empty((0, 4), np.int32), block_size)
    source = _slots("blocks", table, np.array([at - rest]), block_size)
    return SplicePlan(
        np.stack(np.broadcast_arrays(source, fresh * block_size, rest, PLAIN), axis=1).astype(
            np.int32
        ),
        block_size,
    )


def _table(name: str, blocks: npt.ArrayLike) -> npt.NDArray[np.int64]:
    table = np.asarray(blocks)
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} are {table.dtype} of shape {table.shape}, expected a list of block numbers"
        )
    if (table.astype(np.int64) < 0).any():
        raise ValueError(f"{name} have block {table.min()}, expected at least 0")
    return table.astype(np.int64)


def _slots(
    name: str, table: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int64]:
    if positions.size and (positions[0] < 0 or positions[-1] // block_size >= len(table)):
        raise ValueError(
            f"positions {positions[0]} to {positions[-1]} are asked for, expected within the "
            f"{len(table)} {name} of {block_size} tokens"
        )
    slots: npt.NDArray[np.int64] = (
        table[positions // block_size] * block_size + positions % block_size
    )
    return slots


Side = tuple[npt.NDArray[np.int64], int, int]
"""A block table, the first position in it, and its block size."""


def _segments(source: Side, destination: Side, tokens: int, rotation: int = PLAIN) -> Ints:
    """``tokens`` in a row on both sides, cut wherever either side's block ends."""
    cuts = [np.arange(-start % size, tokens, size) for _, start, size in (source, destination)]
    starts = np.union1d(np.union1d(*cuts), [0] if tokens else []).astype(np.int64)
    lengths = np.diff(np.append(starts, tokens)) if tokens else starts
    read, written = (
        _slots("blocks", table, start + starts, size)
        for table, start, size in (source, destination)
    )
    columns = np.broadcast_arrays(read, written, lengths, rotation)
    return np.stack(columns, axis=1).astype(np.int32)
