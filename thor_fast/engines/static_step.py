"""A decode step whose tensors stay where they are: what a CUDA graph can hold.

Legend: R rows, W blocks per row, B positions per block, T = R tokens, Hq query heads, Hkv
key/value heads, D head width.

``PagedStep`` fits its tensors to the sequences of a step. Here they have the shape of a *bucket*,
R rows of W blocks, and are filled in place before each step, so that the same launches serve every
step that fits. Rows without a sequence write to the pool's scratch block and read from it; what
comes out of them means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from thor_fast.engines.decode_attention import DecodeAttention
from thor_fast.engines.paged_attention import Chunk, KVPool

__all__ = ["StaticStep"]


class StaticStep:
    """At most R sequences of at most W blocks, one token each; see ``model_twin.Step``.

    ``attention`` is built for the same R and W.
    """

    def __init__(self, pool: KVPool, rows: int, width: int, attention: DecodeAttention) -> None:
        self._pool, self._attention = pool, attention
        self._shape = rows, width
        self._inputs = torch.zeros((3, rows), dtype=torch.int64, device=pool.device)
        self.input_ids, self.position_ids = self._inputs[0][None], self._inputs[1][None]
        self._where = self._inputs[2]
        self.last = torch.arange(rows, device=pool.device)

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Take in the next step: logits of the first ``len(chunks)`` rows are those of ``chunks``.

        Nothing of the step before is left.
        """
        rows, width = self._shape
        size, scratch = self._pool.block_size, self._pool.scratch
        ids, positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        ids[: len(chunks)] = [chunk.ids[0] for chunk in chunks]
        positions[: len(chunks)] = [chunk.start for chunk in chunks]
        table = np.full((rows, width), scratch, np.int64)
        for row, chunk in zip(table, chunks, strict=False):
            used = chunk.start // size + 1
            row[:used] = chunk.blocks[:used]
            # Of the sequence's own: masked values are multiplied by 0, and 0 * NaN is NaN, so that
            # logits gone wrong in one sequence, or in a row without one, would spoil this one.
            row[used:] = row[0]
        blocks = table[np.arange(rows), positions // size]
        where = blocks * size + positions % size
        self._inputs.copy_(torch.from_numpy(np.stack((ids, positions, where))))
        self._attention.plan(positions + 1, table)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write this step's keys and values, then attend: [1, Hq, R, D] to [1, R, Hq, D]."""
        self._pool.write(layer, self._where, key, value)
        return self._attention.attend(layer, query[0].transpose(0, 1), scale)[None]
