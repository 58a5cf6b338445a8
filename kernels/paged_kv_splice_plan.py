"""What to copy: segments of tokens, for all layers, keys and values of a whole batch of requests.

Legend: n segments, BS slots (tokens) of a block. ``slot = block * BS + offset``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PLAIN", "Ints", "SplicePlan", "check_disjoint"]

Ints = npt.NDArray[np.int32]

PLAIN = -1
"""``rot_id`` of a segment whose keys are copied as they are."""


@dataclass(frozen=True, eq=False, slots=True)
class SplicePlan:
    """``segments`` int32 [n, 4]: source slot, destination slot, tokens, rot_id (``PLAIN``: none).

    No segment crosses a block on either side, and no slot is written twice. Plans add up: ``a + b``
    is one launch, in no order between the two.

    Args:
        segments: see above.
        block_size: BS of the cache that is written.
        source_block_size: BS of the cache that is read, where that is another one.

    Raises:
        ValueError: a segment breaks these rules; the message says which.
    """

    segments: Ints
    block_size: int
    source_block_size: int | None = None

    def __post_init__(self) -> None:
        if self.source_block_size is None:
            object.__setattr__(self, "source_block_size", self.block_size)
        for name in ("block_size", "source_block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        _check_segments(self.segments, self.source_block_size or 0, self.block_size)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def tokens(self) -> int:
        """How many are copied."""
        return int(self.segments[:, 2].sum())

    def __add__(self, other: SplicePlan) -> SplicePlan:
        sizes = [(p.block_size, p.source_block_size) for p in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"plans are for blocks of (written, read) {sizes[0]} and {sizes[1]} tokens, "
                "expected the same"
            )
        return SplicePlan(np.concatenate([self.segments, other.segments]), *sizes[0])


def _check_segments(segments: Ints, read: int, written: int) -> None:
    if segments.dtype != np.int32 or segments.ndim != 2 or segments.shape[1] != 4:
        raise ValueError(
            f"segments are {segments.dtype} of shape {segments.shape}, expected int32 (n, 4)"
        )
    source, destination, tokens, rotation = segments.T.astype(np.int64)
    for name, start, block_size in (
        ("source", source, read),
        ("destination", destination, written),
    ):
        wrong = (start < 0) | (tokens < 1) | (start % block_size + tokens > block_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"segment {at} is {segments[at].tolist()}, expected a {name} of at least one "
                f"token within one block of {block_size}"
            )
    if (rotation < PLAIN).any():
        raise ValueError(f"rot_id is {rotation.min()}, expected at least {PLAIN}")
    order = np.argsort(destination)
    ends = (destination + tokens)[order]
    twice = ends[:-1] > destination[order][1:]
    if twice.any():
        at = int(twice.argmax())
        raise ValueError(
            f"slot {destination[order][at + 1]} is written twice, by segments {order[at]} and "
            f"{order[at + 1]}, expected once"
        )


def check_disjoint(plan: SplicePlan) -> None:
    """No slot is both read and written: the order in which a launch copies is not defined.

    Raises:
        ValueError: one is.
    """
    source, destination, tokens, _ = plan.segments.T.astype(np.int64)
    order = np.argsort(destination)
    starts, ends = destination[order], (destination + tokens)[order]
    # Of the destinations, which do not overlap, the first that ends behind where a source begins.
    first = np.searchsorted(ends, source, side="right")
    hit = starts[np.minimum(first, len(starts) - 1)] < source + tokens
    hit &= first < len(starts)
    if hit.any():
        at = int(hit.argmax())
        raise ValueError(
            f"segment {at} reads slots {source[at]} to {source[at] + tokens[at] - 1}, which "
            f"segment {order[first[at]]} writes, expected sources and destinations apart"
        )
