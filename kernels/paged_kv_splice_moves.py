"""How often a block's keys have been turned: each time rounds them once more.

Measured against float64 with bfloat16 keys of width 128: off by 1.6e-3 of their norm after one
move, which is the rounding to bfloat16 itself, 2.5e-3 after two, 6.5e-3 after eight
(docs/numerics.md).

Legend: NB blocks.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from .paged_kv_splice_plan import PLAIN, SplicePlan

__all__ = ["MoveCounts"]


class MoveCounts:
    """A count per block of one cache, and the most that is allowed before a new prefill.

    Args:
        blocks: NB.
        limit: most moves of any key since it was computed.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, blocks: int, limit: int = 2) -> None:
        if blocks < 1 or limit < 1:
            raise ValueError(f"blocks is {blocks} and limit {limit}, expected at least 1")
        self._limit = limit
        self._counts = np.zeros(blocks, np.int64)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[NB], a copy."""
        return self._counts.copy()

    def reset(self, blocks: Collection[int]) -> None:
        """These were allocated anew: whatever comes into them is computed, or recorded."""
        self._counts[np.fromiter(blocks, np.int64)] = 0

    def record(self, plan: SplicePlan) -> None:
        """Count a plan of this cache that is about to run; a plain copy inherits its source's.

        Raises:
            ValueError: it would pass the limit; nothing is counted then.
        """
        read, written = (plan.segments[:, side] // plan.block_size for side in (0, 1))
        moved = self._counts[read] + (plan.segments[:, 3] != PLAIN)
        if (moved > self._limit).any():
            at = int(moved.argmax())
            raise ValueError(
                f"keys of block {read[at]} would be turned for the {moved[at]}. time, expected at "
                f"most {self._limit}: prefill them again"
            )
        np.maximum.at(self._counts, written, moved)
