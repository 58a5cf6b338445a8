"""The KV pool, and attention over block tables: what one step of the engine reads and writes.

Legend: N blocks, B positions per block, T tokens of one step, R decoding rows, P positions of the
longest of them, rounded up to blocks, Hq query heads, Hkv key/value heads, D head width.

Torch has no attention that follows a block table, so blocks are gathered first. On a CPU that costs
little as long as what was gathered is still in its cache when attention reads it: rows are gathered
a group at a time, of at most a MiB, into a buffer that every group and layer uses again. Measured
on one core (8 query heads on 2, width 64): 32 rows of 128 to 256 tokens take 0.71 ms in groups,
1.13 ms in one piece, 0.56 ms from rows that lie ready; 64 rows of 512 to 1024: 5.9, 14.5, 5.1 ms.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from thor_fast.engines.tail_copies import TailCopy, tail_plan
from thor_fast.errors import EngineError
from thor_fast.kernels import KVView, splice

__all__ = ["Chunk", "KVPool", "PagedStep"]

# Keys and values that are gathered at a time on a CPU: half the second-level cache of a core.
_GROUP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence: ``ids`` go to positions ``start ...`` of the ``blocks``."""

    blocks: Sequence[int]
    start: int
    ids: Sequence[int]


class KVPool:
    """Keys and values of N blocks of B positions, allocated once: [layers, 2, N + 1, B, Hkv, D].

    One block more than asked for: ``scratch``, which holds no sequence, is written by rows that pad
    a step.
    ``like``: one layer's keys, see :class:`~thor_fast.engines.model_twin.Heads`. Raises
    ``EngineError`` where there is not enough memory.
    """

    def __init__(self, blocks: int, block_size: int, layers: int, like: torch.Tensor) -> None:
        shape = (layers, 2, blocks + 1, block_size, like.shape[1], like.shape[3])
        size = int(np.prod(shape, dtype=object)) * like.element_size()
        try:
            self._kv = _zeros(size, like).view(shape)
        except (RuntimeError, OSError, OverflowError) as error:
            raise EngineError(
                f"no memory for a KV pool of {blocks * block_size} tokens, {size / 2**30:.1f} GiB "
                f"on {like.device}, expected a smaller kv_tokens"
            ) from error
        self.block_size, self.scratch = block_size, blocks
        self.device, self.dtype = like.device, like.dtype
        self._view = KVView.stacked(self._kv)
        # Indexing the big tensor in every layer of every step would cost as much as the write.
        self._layers = [(kv[0], kv[1]) for kv in self._kv]
        self._flat = [(kv[0].flatten(0, 1), kv[1].flatten(0, 1)) for kv in self._kv]
        self._gathered = self._kv.new_empty((2, 0))

    def copy_tails(self, copies: Sequence[TailCopy]) -> None:
        """All copies in one launch."""
        if copies:
            splice(self._view, tail_plan(copies, self.block_size, self.block_size))

    def clear(self, blocks: Sequence[int]) -> None:
        """Overwrite what is not finite and would reach whoever has these blocks next."""
        self._kv[:, :, torch.tensor(blocks, dtype=torch.int64, device=self.device)] = 0

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values of a layer, [N + 1, B, Hkv, D] each."""
        return self._layers[layer]

    def write(
        self, layer: int, where: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put [1, Hkv, T, D] keys and values at flat positions ``where`` [T] (block * B + ...)."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, where, key[0].transpose(0, 1))
        values.index_copy_(0, where, value[0].transpose(0, 1))

    def gather(
        self, layer: int, table: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, Hkv, P, D] of the blocks in ``table`` [rows * P / B].

        Valid until the next call.
        """
        keys, values = self._layers[layer]
        tail = keys.shape[1:]
        size = len(table) * tail.numel()
        if self._gathered.shape[1] < size:
            self._gathered = self._kv.new_empty((2, size))
        out = self._gathered[:, :size].view(2, len(table), *tail)
        torch.index_select(keys, 0, table, out=out[0])
        torch.index_select(values, 0, table, out=out[1])
        keys, values = out.view(2, rows, -1, *tail[1:]).transpose(2, 3)
        return keys, values

    def rows_at_once(self, blocks: int) -> int:
        """How many rows of that many blocks each to gather at a time."""
        if self.device.type != "cpu":
            return 1 << 30
        return max(1, _GROUP_BYTES // (2 * blocks * self._kv[0, 0, 0].nbytes))


class PagedStep:
    """The tensors of one step, built once and read by every layer; see ``model_twin.Step``.

    ``chunks`` in the order of the packed sequence; those of one token (decoding rows) must come
    first, the longest sequence first.
    """

    def __init__(self, pool: KVPool, chunks: Sequence[Chunk]) -> None:
        self._pool = pool
        size = pool.block_size
        sizes = np.array([len(chunk.ids) for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.cumsum(sizes)
        rows = int((sizes == 1).sum())
        groups = _groups(pool, chunks[:rows])
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
        blocks = [c.blocks[p // size] for c in chunks for p in range(c.start, c.start + len(c.ids))]
        # One copy from host to device per step.
        arrays = [
            np.array([token for chunk in chunks for token in chunk.ids]),
            positions,
            np.array(blocks) * size + positions % size,
            ends - 1,
            *(_table(chunks[group], size) for group in groups),
            *(_table([c], size) if c.start else np.empty(0, np.int64) for c in chunks[rows:]),
        ]
        packed = torch.from_numpy(np.concatenate(arrays)).to(pool.device)
        ids, where, self._where, self.last, *tables = torch.split(packed, [len(a) for a in arrays])
        self.input_ids, self.position_ids = ids[None], where[None]
        self._groups = [
            _DecodeGroup(pool, group, where[group], table)
            for group, table in zip(groups, tables, strict=False)
        ]
        self._prefill = [
            _PrefillRow(pool, chunk, int(end), table)
            for chunk, end, table in zip(
                chunks[rows:], ends[rows:], tables[len(groups) :], strict=True
            )
        ]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write this step's keys and values, then attend: [1, Hq, T, D] to [1, T, Hq, D]."""
        self._pool.write(layer, self._where, key, value)
        packed = query[0].transpose(0, 1)
        parts = [group.attend(layer, packed, scale) for group in self._groups]
        parts += [row.attend(layer, packed, key, value, scale) for row in self._prefill]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _zeros(size: int, like: torch.Tensor) -> torch.Tensor:
    """``size`` bytes of ``like``'s dtype, on its device, in one dimension.

    Zeros, not empty: the masked tail of a row is multiplied by 0, and 0 * NaN is NaN. In huge pages
    on a CPU: blocks lie anywhere, and to look up their 4 KiB pages takes a fifth of a decode step.
    Raises ``RuntimeError`` (torch's allocators), ``OSError`` or ``OverflowError`` without memory.
    """
    if like.device.type != "cpu":
        return like.new_zeros(size // like.element_size())
    # Private: a shared mapping, the default, would be a file's, without huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype)


def _width(chunk: Chunk, block_size: int) -> int:
    """How many blocks the sequence fills, new tokens included."""
    return -(-(chunk.start + len(chunk.ids)) // block_size)


def _groups(pool: KVPool, rows: Sequence[Chunk]) -> list[slice]:
    """The decoding rows, cut into what is gathered at a time; each starts with its longest row."""
    groups, first = [], 0
    while first < len(rows):
        last = min(len(rows), first + pool.rows_at_once(_width(rows[first], pool.block_size)))
        groups.append(slice(first, last))
        first = last
    return groups


def _table(chunks: Sequence[Chunk], block_size: int) -> np.ndarray[Any, Any]:
    """The blocks of all chunks, each padded to the first one's number with block 0, unread."""
    width = _width(chunks[0], block_size)
    table = np.zeros((len(chunks), width), np.int64)
    for row, chunk in zip(table, chunks, strict=True):
        n = _width(chunk, block_size)
        row[:n] = chunk.blocks[:n]
    return table.reshape(-1)


class _DecodeGroup:
    """One query token each of some rows, as one batched attention."""

    def __init__(
        self, pool: KVPool, rows: slice, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        self._pool, self._rows, self._table = pool, rows, table
        self._count = rows.stop - rows.start
        reach = torch.arange(len(table) // self._count * pool.block_size, device=pool.device)
        hidden = reach > positions[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device)
        self._mask = self._mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(self, layer: int, packed: torch.Tensor, scale: float) -> torch.Tensor:
        """[T, Hq, D] of the whole step to [rows, Hq, D] of this group."""
        keys, values = self._pool.gather(layer, self._table, self._count)
        query = packed[self._rows]
        # Query heads that share a key head become its query rows: keys are read once.
        shared = query.reshape(self._count, keys.shape[1], -1, query.shape[2])
        out = F.scaled_dot_product_attention(
            shared, keys, values, attn_mask=self._mask, scale=scale
        )
        return out.reshape(query.shape)


class _PrefillRow:
    """Several query tokens of one sequence; ``table`` is empty where they are its first."""

    def __init__(self, pool: KVPool, chunk: Chunk, end: int, table: torch.Tensor) -> None:
        self._pool, self._table = pool, table
        self._tokens = slice(end - len(chunk.ids), end)
        self._length = chunk.start + len(chunk.ids)
        self._mask: torch.Tensor | None = None
        if chunk.start:
            shape = (len(chunk.ids), self._length)
            self._mask = torch.ones(shape, dtype=torch.bool, device=pool.device).tril_(chunk.start)

    def attend(
        self,
        layer: int,
        packed: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[T, Hq, D] (and [1, Hkv, T, D]) of the whole step to [n, Hq, D] of this row."""
        query = packed[self._tokens].transpose(0, 1)[None]
        if self._mask is None:
            keys, values = key[:, :, self._tokens], value[:, :, self._tokens]
        else:
            keys, values = self._pool.gather(layer, self._table, 1)
            keys, values = keys[:, :, : self._length], values[:, :, : self._length]
        groups = query.shape[1] // keys.shape[1]
        if groups > 1:
            keys = keys.repeat_interleave(groups, dim=1)
            values = values.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self._mask, is_causal=self._mask is None, scale=scale
        )
        return out[0].transpose(0, 1)
