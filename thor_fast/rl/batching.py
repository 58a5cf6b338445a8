"""What a training step reads: sequences packed one after the other, and what is known per token.

Legend: T tokens of the batch, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thor_fast.kernels import Counts

__all__ = ["TrainingBatch"]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Position i of every [T] field is about token i itself, as in ``Trajectory``: no shift yet.

    Masks, levels, advantages and bounds are on the CPU, so that choosing rows waits for no device;
    the other fields may be anywhere. A field of shape [B] holds one value per sequence.
    """

    token_ids: torch.Tensor
    """[T] int64 or int32."""
    cu_seqlens: torch.Tensor
    """[B + 1] integer, ascending from 0 to T: where sequences begin and end."""
    loss_mask: torch.Tensor
    """[T] bool or 0 and 1: tokens the policy sampled and is to learn from. Never a sequence's first
    token, which nothing predicts."""
    level: torch.Tensor | int
    """[T] or [B] integer, or one for all: 0 for tokens of whole episodes, 1 for those of re-sampled
    steps."""
    advantages: torch.Tensor
    """[T] or [B] float."""
    old_logprobs: torch.Tensor
    """[T] float: what the policy ratio is against; as sampled, or recomputed before the first
    update. Only read under the mask."""
    ref_logprobs: torch.Tensor | None = None
    """[T] float, for a KL penalty."""
    rollout_weight: torch.Tensor | None = None
    """[T] float >= 0: importance weights for the mismatch of engine and trainer."""
    temperature: torch.Tensor | None = None
    """[T] float > 0: what the logits were divided by when the token was sampled."""
    group: torch.Tensor | None = None
    """[B] integer: prompt groups, for the metrics."""
    counts: Counts | None = None
    """Of the whole optimizer step, where this is a part of it (``normalizer="global"``)."""
    step_sequences: int | None = None
    """Sequences of the whole optimizer step, likewise (``normalizer="thor"``)."""
