"""The worker's half of :mod:`thor_fast.engines.vllm_connector` on a GPU, without vLLM in it.

Legend: NB scheduler's blocks, k kernel blocks that make up one of them, BS tokens of a kernel
block. Tokens are numbered through a scheduler's block, and so are its kernel blocks, so ``slot =
block * k * BS + offset`` is the same number in both.

One launch copies the tokens that are shared, in all layers, keys and values; vLLM's own helper
copies whole blocks, one indexing operation per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from thor_fast.kernels import KVView, SplicePlan, splice
from thor_fast.kernels.paged_kv_splice_plan import PLAIN

__all__ = ["BlockCopy", "copier", "tail_plan"]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first ``tokens`` of block ``source`` are to be copied to block ``target``."""

    source: int
    target: int
    tokens: int


def copier(
    kv_caches: Sequence[torch.Tensor], num_blocks: int, head_width: int
) -> Callable[[Sequence[BlockCopy]], None] | None:
    """What copies tokens in these caches: logical shape [NB * k, H, BS, 2 D] each, any strides.

    ``num_blocks``: NB; ``head_width``: D of a key and of a value. ``None`` where only whole blocks
    can be copied: on a CPU, where K is transposed inside a block, and in caches whose form
    :class:`~thor_fast.kernels.KVView` does not know, such as quantised ones.
    """
    # Layers that share their KV have the same tensor; its tokens are copied once.
    own = {cache.data_ptr(): cache for cache in kv_caches}
    try:
        view = KVView.vllm(list(own.values()), head_width)
    except ValueError:
        return None
    if view.whole_blocks or view.blocks % num_blocks:
        return None
    block_size = view.block_size * (view.blocks // num_blocks)

    def copy(copies: Sequence[BlockCopy]) -> None:
        splice(view, tail_plan(copies, block_size, view.block_size))

    return copy


def tail_plan(copies: Sequence[BlockCopy], block_size: int, kernel_block_size: int) -> SplicePlan:
    """A plan of all copies. ``block_size``: tokens of a scheduler's block, a multiple of BS.

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
