"""Plain torch: all logits at once, in float32 for the softmax, autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Of every row: the mask comes after, as trainers do."""

    def run() -> torch.Tensor:
        logits = problem.hidden @ problem.weight.t()
        scores = torch.log_softmax(logits.float(), dim=1)
        logp = scores.gather(1, problem.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return loss_of(KIND, logp[problem.rows], problem)

    return run
