"""Liger's fused linear scaled cross-entropy: CuTe kernels on sm_90, a torch fallback elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """All rows; those that are not read are ignored targets."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def run() -> torch.Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden, problem.weight, problem.targets
        )
        nll = found[0] if isinstance(found, tuple) else found
        return loss_of(KIND, -nll[problem.rows], problem)

    return run
