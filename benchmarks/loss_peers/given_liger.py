"""Liger's Triton GRPO of given logits; no dual clip, no NLL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from loss_truth import Kind

from loss_peers.unsupported import Unsupported

if TYPE_CHECKING:
    from loss_given import Given

KIND = Kind.CLIPPED


def make(given: Given) -> Callable[[], torch.Tensor]:
    """[B, L, V], of which it leaves the last row of each sequence out; logits are kept."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    if not given.logits.is_cuda:
        raise Unsupported("needs CUDA")
    problem = given.problem
    batch = problem.sequences
    targets = problem.targets.view(batch, -1)[:, :-1]
    mask = (targets >= 0).to(torch.float32).contiguous()
    targets, old = targets.clamp(min=0).contiguous(), problem.old_logp.view(batch, -1)[:, :-1]
    old = old.contiguous()

    def run() -> torch.Tensor:
        loss, _ = triton_grpo_loss(
            given.logits.view(batch, -1, given.logits.shape[1]),
            old,
            None,
            targets,
            problem.advantages,
            completion_mask=mask,
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.28,
            inplace=False,
            loss_type="bnpo",
            reduce=True,
        )
        return loss

    return run
