"""Apple's cut cross-entropy with its default gradient filter, which is not exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of

from loss_peers.unsupported import Unsupported

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Ignored rows are skipped by the peer."""
    from cut_cross_entropy import linear_cross_entropy

    if not problem.hidden.is_cuda:
        raise Unsupported("needs CUDA")

    def run() -> torch.Tensor:
        nll = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none"
        )
        return loss_of(KIND, -nll[problem.rows], problem)

    return run
