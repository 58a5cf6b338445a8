"""The splice in torch: the oracle of the Triton kernel, and the path on CPU.

Legend: t tokens that are copied, L layers, H heads, D head width, R rotated width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .paged_kv_splice_plan import PLAIN, Ints, SplicePlan
from .paged_kv_splice_rotation import NO_ROPE, Rope
from .paged_kv_splice_view import KVView

__all__ = ["splice_reference", "turn"]


class _Turns(NamedTuple):
    """Which of the tokens are turned, and by what."""

    which: torch.Tensor  # int64, of the t tokens
    rotations: torch.Tensor  # [which, tables, 1, R/2, 2]: one for all heads
    rope: Rope


def splice_reference(view: KVView, plan: SplicePlan, source: KVView) -> None:
    """One gather and one scatter per layer, for keys and for values."""
    tokens = plan.segments[:, 2]
    read = _places(plan.segments[:, 0], tokens, source)
    written = _places(plan.segments[:, 1], tokens, view)
    turns = _turns(plan, view.device)
    for layer in range(view.layers):
        # Everything is read before anything is written, whatever overlaps.
        keys = source.keys[layer][read]
        if turns is not None:
            _turn_some(keys, turns, layer)
        view.keys[layer][written] = keys
        view.values[layer][written] = source.values[layer][read]


def turn(keys: torch.Tensor, rotations: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Keys [..., D] with their first R numbers turned by ``rotations`` [..., R/2, 2].

    In float32 (float64 for such keys), then rounded to the keys' dtype.
    """
    half = rotations.shape[-2]
    exact = torch.promote_types(keys.dtype, torch.float32)
    cosine, sine = rotations.to(exact).unbind(-1)
    turned = keys[..., : 2 * half].to(exact)
    pairs = turned.reshape(*turned.shape[:-1], *((half, 2) if interleaved else (2, half)))
    first, second = pairs.unbind(-1 if interleaved else -2)
    both = (first * cosine - second * sine, second * cosine + first * sine)
    pairs = torch.stack(both, dim=-1 if interleaved else -2)
    return torch.cat([pairs.flatten(-2).to(keys.dtype), keys[..., 2 * half :]], dim=-1)


def _places(starts: Ints, tokens: Ints, view: KVView) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset [t] of each token."""
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    slots = torch.from_numpy(np.repeat(starts, tokens) + within).to(view.device)
    return slots // view.block_size, slots % view.block_size


def _turns(plan: SplicePlan, device: torch.device) -> _Turns | None:
    if plan.rope is None or not plan.rotates:
        return None
    ids = np.repeat(plan.segments[:, 3], plan.segments[:, 2])
    which = np.flatnonzero(ids != PLAIN)
    tables = len(plan.rope.frequencies)
    rotations = plan.rotations.reshape(-1, tables, 1, *plan.rotations.shape[1:])[ids[which]]
    return _Turns(
        torch.from_numpy(which).to(device), torch.from_numpy(rotations).to(device), plan.rope
    )


def _turn_some(keys: torch.Tensor, turns: _Turns, layer: int) -> None:
    """Those of [t, H, D] that are, in place."""
    table = turns.rope.layers[layer] if turns.rope.layers else 0
    if table == NO_ROPE:
        return
    rotations = turns.rotations[:, table]
    turned = turn(keys[turns.which], rotations, interleaved=turns.rope.interleaved)
    keys[turns.which] = turned
