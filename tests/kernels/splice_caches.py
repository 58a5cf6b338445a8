"""Caches in every layout a view knows, each with what it holds in one plain order.

Legend: L layers, NB blocks, BS tokens of a block, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from thor_fast.kernels import KVView

__all__ = ["LAYOUTS", "Cache", "make_cache"]

VLLM_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


@dataclass
class Cache:
    view: KVView
    storage: list[torch.Tensor]  # all that was allocated, also what the view does not show
    read: Callable[[], torch.Tensor]  # [L, 2, NB, BS, H, D], not through the view

    def raw(self) -> torch.Tensor:
        """[L, 2, NB * BS, H, D], the bits as integers."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.view.keys[0].element_size()]
        return self.read().flatten(2, 3).contiguous().view(bits)


Shape = tuple[int, int, int, int, int]  # L, NB, BS, H, D


def _stacked(shape: Shape, fill: Callable[..., torch.Tensor]) -> Cache:
    kv = fill(shape[0], 2, *shape[1:])
    return Cache(KVView.stacked(kv), [kv], lambda: kv)


def _pools(shape: Shape, fill: Callable[..., torch.Tensor]) -> Cache:
    keys, values = fill(*shape), fill(*shape)
    return Cache(
        KVView.pools(keys, values), [keys, values], lambda: torch.stack([keys, values], dim=1)
    )


def _slices_of_wider_heads(shape: Shape, fill: Callable[..., torch.Tensor]) -> Cache:
    """One tensor per layer, heads before tokens, with numbers around that are not the cache's."""
    layers, blocks, size, heads, width = shape
    whole = [[fill(blocks, heads, size, width + 3) for _ in range(layers)] for _ in range(2)]
    keys, values = ([t[..., 1 : 1 + width].transpose(1, 2) for t in kind] for kind in whole)
    return Cache(
        KVView.pools(keys, values),
        [*whole[0], *whole[1]],
        lambda: torch.stack([torch.stack(keys), torch.stack(values)], dim=1),
    )


def _vllm(order: str) -> Callable[[Shape, Callable[..., torch.Tensor]], Cache]:
    def make(shape: Shape, fill: Callable[..., torch.Tensor]) -> Cache:
        layers, blocks, size, heads, width = shape
        sizes = dict(zip("LBHNC", (layers, blocks, heads, size, 2 * width), strict=True))
        whole = fill(*(sizes[name] for name in order))
        logical = whole.permute(*(order.index(name) for name in "LBHNC"))

        def read() -> torch.Tensor:  # [L, B, H, N, 2, D] -> [L, 2, B, N, H, D]
            return logical.unflatten(4, (2, width)).permute(0, 4, 1, 3, 2, 5)

        return Cache(KVView.packed_layers(list(logical), width), [whole], read)

    return make


LAYOUTS: dict[str, Callable[[Shape, Callable[..., torch.Tensor]], Cache]] = {
    "stacked": _stacked,
    "pools": _pools,
    "slices": _slices_of_wider_heads,
    **{order: _vllm(order) for order in VLLM_ORDERS},
}


def make_cache(
    layout: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Cache:
    """Of random numbers of magnitude one: (L, NB, BS, H, D)."""
    gen = np.random.default_rng(seed)

    def fill(*sizes: int) -> torch.Tensor:
        return torch.from_numpy(gen.standard_normal(sizes, np.float32)).to(dtype).to(device)

    return LAYOUTS[layout](shape, fill)
