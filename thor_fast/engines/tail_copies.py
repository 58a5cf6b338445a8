"""The shared tokens of a block, copied to the block of whoever goes on behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thor_fast.kernels import SplicePlan
from thor_fast.kernels.paged_kv_splice_plan import PLAIN

__all__ = ["TailCopy", "tail_plan"]


@dataclass(frozen=True, slots=True)
class TailCopy:
    """The first ``tokens`` positions of block ``source`` are to be copied to ``target``."""

    source: int
    target: int
    tokens: int


def tail_plan(copies: Sequence[TailCopy], block_size: int, kernel_block_size: int) -> SplicePlan:
    """A plan of all copies, one launch.

    ``block_size``: tokens of a block as ``copies`` count them, a multiple of
    ``kernel_block_size``, that of the cache.

    Raises ``ValueError`` for tokens that a block does not hold, and for slots written twice.
    """
    segments = []
    for copy in copies:
        if not 1 <= copy.tokens <= block_size:
            raise ValueError(f"{copy} has {copy.tokens} tokens, expected 1 to {block_size}")
        for start in range(0, copy.tokens, kernel_block_size):
            tokens = min(kernel_block_size, copy.tokens - start)
            source, target = (block * block_size + start for block in (copy.source, copy.target))
            segments.append((source, target, tokens, PLAIN))
    return SplicePlan(np.array(segments, np.int32).reshape(-1, 4), kernel_block_size)
