"""The splice in torch: the oracle of the Triton kernel, and the path on CPU.

Legend: t tokens that are copied, H heads, D head width.
"""

from __future__ import annotations

import numpy as np
import torch

from .paged_kv_splice_plan import Ints, SplicePlan
from .paged_kv_splice_view import KVView

__all__ = ["splice_reference"]


def splice_reference(view: KVView, plan: SplicePlan, source: KVView) -> None:
    """One gather and one scatter per layer, for keys and for values."""
    tokens = plan.segments[:, 2]
    read = _indices(plan.segments[:, 0], tokens, source)
    written = _indices(plan.segments[:, 1], tokens, view)
    for from_, to in ((source.keys, view.keys), (source.values, view.values)):
        for layer_from, layer_to in zip(from_, to, strict=True):
            # Everything is read before anything is written, whatever overlaps.
            layer_to[written] = layer_from[read]


def _indices(starts: Ints, tokens: Ints, view: KVView) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset [t] of each token."""
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    slots = torch.from_numpy(np.repeat(starts, tokens) + within).to(view.device)
    return slots // view.block_size, slots % view.block_size
