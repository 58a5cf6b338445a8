"""What the losses of this family give, and what all of them tell autograd about it.

Legend: T tokens of the packed batch, N rows that are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .hierarchical_grpo_chunks import Found
from .hierarchical_grpo_head import compute_dtype
from .hierarchical_grpo_metrics import Metrics
from .hierarchical_grpo_plan import LEVELS, Selection
from .hierarchical_grpo_tokens import METRICS

__all__ = ["LossOutput", "fake_outputs", "only_the_loss", "outputs_of"]


class LossOutput(NamedTuple):
    """What a call gives."""

    loss: torch.Tensor
    """[] float32 (float64 for such inputs), differentiable."""
    logp: torch.Tensor
    """[T] float32, detached: of the rows that were read, 0 elsewhere."""
    entropy: torch.Tensor
    """[T] float32, detached, in nats: likewise, where ``spec`` asks for it."""
    metrics: Metrics


def outputs_of(
    found: Found, chosen: Selection, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, log-probs and entropies per token, metrics."""
    logp, entropy = (values.new_zeros(tokens) for values in (found.logp, found.entropy))
    logp[chosen.rows], entropy[chosen.rows] = found.logp, found.entropy
    return found.metrics[:, METRICS.index("loss")].sum(), logp, entropy, found.metrics


def fake_outputs(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of :func:`outputs_of`, for rows ``like`` [T, ...]."""
    compute, tokens = compute_dtype(like), like.shape[0]
    shapes = ((), (tokens,), (tokens,), (LEVELS, len(METRICS)))
    return tuple(like.new_empty(shape, dtype=compute) for shape in shapes)


def only_the_loss(ctx: Any, output: tuple[torch.Tensor, ...]) -> None:
    """Nothing else has a gradient; and none is made of zeros, [V, H], to be thrown away."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
