"""verl's Triton ``linear_cross_entropy``: log-prob and entropy of every row, recompute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of

from loss_peers.unsupported import Unsupported

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """All packed tokens, as verl's actor gives them."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    if not problem.hidden.is_cuda:
        raise Unsupported("needs CUDA")
    targets = problem.targets.clamp(min=0)

    def run() -> torch.Tensor:
        logp, _ = linear_cross_entropy(problem.hidden, problem.weight, targets, 1.0, "none", None)
        return loss_of(KIND, logp[problem.rows], problem)

    return run
