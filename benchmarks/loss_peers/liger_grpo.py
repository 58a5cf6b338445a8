"""Liger's chunked GRPO: gradient in the forward, a sequence at a time; no dual clip, no NLL."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind

KIND = Kind.CLIPPED


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Its padded layout [B, L, H] is the packed one seen so: all sequences have one length."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type="bnpo",
        compiled=problem.hidden.is_cuda,  # compiling for a CPU takes a minute
    )
    batch = problem.sequences
    targets = problem.targets.view(batch, -1)
    mask = (targets >= 0).to(torch.float32)

    def run() -> torch.Tensor:
        found, _ = loss(
            problem.hidden.view(batch, -1, problem.shape.hidden),
            problem.weight,
            targets.clamp(min=0),
            mask,
            problem.advantages,
            old_per_token_logps=problem.old_logp.view(batch, -1),
        )
        return found

    return run
