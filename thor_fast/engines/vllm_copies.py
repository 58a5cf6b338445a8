"""The worker's half of :mod:`thor_fast.engines.vllm_connector` on a GPU, without vLLM in it.

Legend: NB scheduler's blocks, k kernel blocks that make up one of them, BS tokens of a kernel
block. Tokens are numbered through a scheduler's block, and so are its kernel blocks, so ``slot =
block * k * BS + offset`` is the same number in both.

One launch copies the tokens that are shared, in all layers, keys and values; vLLM's own helper
copies whole blocks, one indexing operation per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from thor_fast.engines.tail_copies import TailCopy, tail_plan
from thor_fast.kernels import KVView, splice

__all__ = ["copier"]


def copier(
    kv_caches: Sequence[torch.Tensor], num_blocks: int, head_width: int
) -> Callable[[Sequence[TailCopy]], None] | None:
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

    def copy(copies: Sequence[TailCopy]) -> None:
        splice(view, tail_plan(copies, block_size, view.block_size))

    return copy
