"""What to copy: segments of tokens, for all layers, keys and values of a whole batch of requests.

Legend: n segments, m lanes, R rotated width of a head, BS slots (tokens) of a block.
``slot = block * BS + offset``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .paged_kv_splice_rotation import Rope

__all__ = ["PLAIN", "Ints", "Rotations", "SplicePlan"]

Ints = npt.NDArray[np.int32]
Rotations = npt.NDArray[np.float32]

PLAIN = -1
"""``rot_id`` of a segment whose keys are copied as they are."""


@dataclass(frozen=True, eq=False, slots=True)
class SplicePlan:
    """``segments`` int32 [n, 4]: source slot, destination slot, tokens, rot_id (``PLAIN``: none).

    No segment crosses a block on either side, and no slot is written twice. Plans add up: ``a + b``
    is one launch, in no order between the two. An empty plan is false.

    Args:
        segments: see above.
        block_size: BS of the cache that is written.
        source_block_size: BS of the cache that is read, where that is another one.
        lanes: int32 [m + 1], where each lane's segments begin, and n: those of one lane are copied
            one after the other, lanes in any order. ``None``: each segment is its own.
        rope: how keys carry positions; needed where a segment has a rotation.
        rotations: float32 [ids * tables, R/2, 2], cosine and sine: rot_id ``i`` of a layer with
            table ``t`` is row ``i * tables + t``, the tables being those of ``rope``.
        approximate: what it leaves behind is not what the model would have computed.

    Raises:
        ValueError: these rules are broken; the message says which.
    """

    segments: Ints
    block_size: int
    source_block_size: int = 0
    lanes: Ints | None = None
    rope: Rope | None = None
    rotations: Rotations = field(default_factory=lambda: np.empty((0, 0, 2), np.float32))
    approximate: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.source_block_size < 0:
            raise ValueError(
                f"block_size is {self.block_size} and source_block_size {self.source_block_size}, "
                "expected at least 1 (0: the source's is the same)"
            )
        if not self.source_block_size:
            object.__setattr__(self, "source_block_size", self.block_size)
        _check_segments(self.segments, self.source_block_size, self.block_size)
        if self.lanes is not None:
            _check_lanes(self.lanes, len(self))
        _check_rotations(self)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def tokens(self) -> int:
        """How many are copied."""
        return int(self.segments[:, 2].sum())

    @property
    def rotates(self) -> bool:
        """Whether any key is turned."""
        return bool((self.segments[:, 3] != PLAIN).any())

    @property
    def lane_starts(self) -> Ints:
        """``lanes``, written out."""
        return np.arange(len(self) + 1, dtype=np.int32) if self.lanes is None else self.lanes

    def __add__(self, other: SplicePlan) -> SplicePlan:
        sizes = [(p.block_size, p.source_block_size) for p in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"plans are for blocks of (written, read) {sizes[0]} and {sizes[1]} tokens, "
                "expected the same"
            )
        ropes = [p.rope for p in (self, other) if p.rope is not None]
        if len(ropes) == 2 and ropes[0] != ropes[1]:
            raise ValueError(f"plans have the ropes {ropes[0]} and {ropes[1]}, expected the same")
        rope = ropes[0] if ropes else None
        ids = len(self.rotations) // len(rope.frequencies) if rope else 0
        behind = other.segments.copy()
        behind[:, 3] += np.where(behind[:, 3] == PLAIN, 0, ids)
        lanes = None
        if self.lanes is not None or other.lanes is not None:
            lanes = np.append(self.lane_starts[:-1], other.lane_starts + np.int32(len(self)))
        turned = [p.rotations for p in (self, other) if len(p.rotations)]
        return SplicePlan(
            np.concatenate([self.segments, behind]),
            *sizes[0],
            lanes,
            rope,
            np.concatenate(turned) if turned else self.rotations,
            self.approximate or other.approximate,
        )

    def overlaps(self) -> bool:
        """Whether it reads slots that it writes, in a way that lanes make safe.

        Within a lane, segments are copied in their order and the tokens of one upwards: a slot may
        be written once it has been read. Between lanes there is no order.

        Raises:
            ValueError: a slot may be written before it is read.
        """
        source, destination, tokens, _ = self.segments.T.astype(np.int64)
        order = np.argsort(destination)
        starts, ends = destination[order], (destination + tokens)[order]
        # Destinations do not overlap: those that touch a source are neighbours in their order.
        first = np.searchsorted(ends, source, side="right")
        count = np.maximum(np.searchsorted(starts, source + tokens) - first, 0)
        reader = np.repeat(np.arange(len(self)), count)
        rank = np.arange(len(reader)) - np.repeat(np.cumsum(count) - count, count)
        writer = order[first[reader] + rank]
        lane = np.searchsorted(self.lane_starts, np.arange(len(self)), side="right")
        safe = (lane[writer] == lane[reader]) & (writer >= reader)
        safe &= (writer > reader) | (destination[writer] <= source[writer])
        if not safe.all():
            at = int(safe.argmin())
            i, j = int(reader[at]), int(writer[at])
            raise ValueError(
                f"segment {i} reads slots {source[i]} to {source[i] + tokens[i] - 1}, which "
                f"segment {j} may write before that (slots {destination[j]} to "
                f"{destination[j] + tokens[j] - 1}), expected other blocks or a move to the left"
            )
        return bool(len(reader))


def _check_segments(segments: Ints, read: int, written: int) -> None:
    if segments.dtype != np.int32 or segments.ndim != 2 or segments.shape[1] != 4:
        raise ValueError(
            f"segments are {segments.dtype} of shape {segments.shape}, expected int32 (n, 4)"
        )
    starts, tokens = segments[:, :2].astype(np.int64), segments[:, 2].astype(np.int64)
    sizes = np.array((read, written))
    wrong = (starts < 0) | (tokens < 1)[:, None] | (starts % sizes + tokens[:, None] > sizes)
    if wrong.any():
        at, side = divmod(int(wrong.argmax()), 2)
        name = ("source", "destination")[side]
        raise ValueError(
            f"segment {at} is {segments[at].tolist()}, expected a {name} of at least one token "
            f"within one block of {sizes[side]}"
        )
    order = np.argsort(starts[:, 1])
    destination, tokens = starts[order, 1], tokens[order]
    twice = destination[:-1] + tokens[:-1] > destination[1:]
    if twice.any():
        at = int(twice.argmax())
        raise ValueError(
            f"slot {destination[at + 1]} is written twice, by segments {order[at]} and "
            f"{order[at + 1]}, expected once"
        )


def _check_lanes(lanes: Ints, segments: int) -> None:
    ordered = lanes.dtype == np.int32 and lanes.ndim == 1 and len(lanes) > 0
    if not ordered or lanes[0] != 0 or lanes[-1] != segments or (np.diff(lanes) < 1).any():
        raise ValueError(
            f"lanes are {lanes.tolist()}, expected int32, rising from 0 to the {segments} segments"
        )


def _check_rotations(plan: SplicePlan) -> None:
    ids = plan.segments[:, 3]
    if plan.rope is None and not len(plan.rotations) and (ids == PLAIN).all():
        return
    tables = 0 if plan.rope is None else len(plan.rope.frequencies)
    known = 0 if plan.rope is None else len(plan.rotations) // tables
    if ((ids < PLAIN) | (ids >= known)).any():
        raise ValueError(
            f"rot_ids are from {ids.min()} to {ids.max()}, expected from {PLAIN} (none) to below "
            f"the plan's {known} rotations"
        )
    expected = (known * tables, plan.rope.width // 2, 2) if plan.rope is not None else (0, 0, 2)
    if plan.rotations.shape != expected and len(plan.rotations):
        raise ValueError(
            f"rotations have shape {plan.rotations.shape}, expected {expected}: (ids * tables, "
            "R/2, 2)"
        )
