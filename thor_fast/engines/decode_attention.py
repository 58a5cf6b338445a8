"""Attention of one query token per row over a block table of fixed shape: three ways to compute it.

Legend: R rows, W blocks per row, B positions per block, P = W * B positions per row, Hq query
heads, Hkv key/value heads, D head width.

Torch has none that follows a block table, so by default blocks are gathered first. FlashInfer and
FlashAttention have one each, for half-precision models on a GPU; which one serves is settled once,
when an engine is built (:func:`choose_attention`). Whichever it is, what depends on the sequences
is written into tensors that stay (:meth:`DecodeAttention.plan`), outside of a CUDA graph, and what
is launched per layer (:meth:`DecodeAttention.attend`) depends on shapes only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from thor_fast.engines.model_twin import Heads
from thor_fast.engines.paged_attention import KVPool

__all__ = ["GATHER", "AttentionKind", "DecodeAttention", "choose_attention"]

_Int64 = npt.NDArray[np.int64]

_HALF = (torch.bfloat16, torch.float16)
# What FlashInfer's documentation recommends; all wrappers share one, since steps do not overlap.
_WORKSPACE_BYTES = 128 << 20
# FlashInfer compiles a kernel per head width; these are the ones it is tested with.
_FLASHINFER_WIDTHS = (64, 128, 256)
# FlashAttention 2 reads pages of a multiple of this, and heads up to this wide.
_FLASH_PAGE, _FLASH_WIDTH = 256, 256


class DecodeAttention(Protocol):
    """Attention for R rows of at most W blocks."""

    def plan(self, lengths: _Int64, table: _Int64) -> None:
        """Take in the next step: ``lengths`` [R], at least 1, new token included; ``table`` [R, W].

        Entries of a row beyond its length name a block that is finite, and weigh nothing.
        """
        ...

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """``query`` [R, Hq, D] to [R, Hq, D]; the new keys and values are in the pool already."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """``build(pool, R, W)``; ``by_width`` where time grows with W and not with the lengths."""

    name: str
    build: Callable[[KVPool, int, int], DecodeAttention]
    by_width: bool


def _load(name: str) -> Any:
    """The module, or ``None`` where it is absent or made for another torch or driver."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def choose_attention(
    heads: Heads, block_size: int, load: Callable[[str], Any] = _load
) -> AttentionKind:
    """The fastest that is installed and can do it: FlashInfer, FlashAttention, else the gather.

    ``load`` maps a module's name to the module or ``None``.
    """
    width, dtype = heads.keys.shape[3], heads.keys.dtype
    if dtype in _HALF and heads.scale is not None and width in _FLASHINFER_WIDTHS:
        flashinfer = load("flashinfer")
        if flashinfer is not None:
            # Zeros: FlashInfer asks for them on first use.
            workspace = heads.keys.new_zeros(_WORKSPACE_BYTES, dtype=torch.uint8)
            infer = partial(_FlashInfer, module=flashinfer, heads=heads, workspace=workspace)
            return AttentionKind("FlashInfer", infer, by_width=False)
    if dtype in _HALF and block_size % _FLASH_PAGE == 0 and width <= _FLASH_WIDTH:
        flash_attn = load("flash_attn")
        if flash_attn is not None:
            flash = partial(_FlashAttention, module=flash_attn)
            return AttentionKind("FlashAttention", flash, by_width=False)
    return GATHER


class _Gather:
    """Blocks gathered into rows of P positions, then torch's attention under a mask."""

    def __init__(self, pool: KVPool, rows: int, width: int) -> None:
        self._pool, self._rows = pool, rows
        device = pool.device
        self._table = torch.zeros(rows * width, dtype=torch.int64, device=device)
        self._lengths = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._reach = torch.arange(width * pool.block_size, device=device)
        self._mask = torch.zeros((rows, len(self._reach)), dtype=pool.dtype, device=device)

    def plan(self, lengths: _Int64, table: _Int64) -> None:
        self._table.copy_(torch.from_numpy(table.reshape(-1)))
        self._lengths.copy_(torch.from_numpy(lengths[:, None]))
        self._mask.zero_().masked_fill_(self._reach >= self._lengths, float("-inf"))

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        # Not KVPool.gather: its buffer moves when it grows, and a graph would read the old one.
        keys, values = (
            part.index_select(0, self._table)
            .view(self._rows, -1, *part.shape[2:])
            .transpose(1, 2)  # [R, Hkv, P, D]
            for part in self._pool.layer(layer)
        )
        # Query heads that share a key head become its query rows: keys are read once.
        shared = query.reshape(self._rows, keys.shape[1], -1, query.shape[2])
        out = F.scaled_dot_product_attention(
            shared, keys, values, attn_mask=self._mask[:, None, None], scale=scale
        )
        return out.reshape(query.shape)


GATHER = AttentionKind("gathered blocks", _Gather, by_width=True)


class _FlashInfer:
    """``flashinfer.BatchDecodeWithPagedKVCacheWrapper`` in its CUDA-graph mode.

    By the documentation of FlashInfer 0.7.2; the arguments used here are there since 0.2. Our pool
    is its "NHD" layout, keys and values as a pair. ``plan`` takes tensors of the host, so that it
    need not wait for the device, and copies them into the buffers given to the constructor.
    """

    def __init__(
        self,
        pool: KVPool,
        rows: int,
        width: int,
        *,
        module: Any,
        heads: Heads,
        workspace: torch.Tensor,
    ) -> None:
        self._pool, self._heads = pool, heads
        buffers = [
            torch.zeros(size, dtype=torch.int32, device=pool.device)
            for size in (rows + 1, rows * width, rows)
        ]
        self._wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            # The other kernel has a few ratios of query to key heads only, and not Qwen2.5's 7.
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffers[0],
            paged_kv_indices_buffer=buffers[1],
            paged_kv_last_page_len_buffer=buffers[2],
        )

    def plan(self, lengths: _Int64, table: _Int64) -> None:
        size, keys = self._pool.block_size, self._heads.keys
        pages = -(-lengths // size)
        used = np.arange(table.shape[1]) < pages[:, None]
        self._wrapper.plan(
            _int32(np.concatenate(([0], pages.cumsum()))),
            _int32(table[used]),
            _int32(lengths - (pages - 1) * size),
            self._heads.queries,
            keys.shape[1],
            keys.shape[3],
            size,
            q_data_type=keys.dtype,
            kv_data_type=keys.dtype,
            sm_scale=self._heads.scale,
        )

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        assert scale == self._heads.scale  # planned before any layer ran
        out: torch.Tensor = self._wrapper.run(query.contiguous(), self._pool.layer(layer))
        return out


class _FlashAttention:
    """``flash_attn.flash_attn_with_kvcache`` over a block table.

    By the docstring of FlashAttention 2.8; ``block_table`` is there since 2.5.
    """

    def __init__(self, pool: KVPool, rows: int, width: int, *, module: Any) -> None:
        self._pool, self._run = pool, module.flash_attn_with_kvcache
        self._table = torch.zeros((rows, width), dtype=torch.int32, device=pool.device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=pool.device)

    def plan(self, lengths: _Int64, table: _Int64) -> None:
        self._table.copy_(_int32(table))
        self._lengths.copy_(_int32(lengths))

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        keys, values = self._pool.layer(layer)
        out: torch.Tensor = self._run(
            query[:, None],  # [R, 1, Hq, D]
            keys,
            values,
            cache_seqlens=self._lengths,
            block_table=self._table,
            softmax_scale=scale,
        )
        return out[:, 0]


def _int32(numbers: _Int64) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int32))
