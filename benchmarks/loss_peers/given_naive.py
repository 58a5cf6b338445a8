"""Plain torch on given logits: float32 softmax of every row, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from loss_truth import Kind, loss_of

if TYPE_CHECKING:
    from loss_given import Given

KIND = Kind.GRPO


def make(given: Given) -> Callable[[], torch.Tensor]:
    """The mask comes after, as trainers do."""
    problem = given.problem

    def run() -> torch.Tensor:
        scores = torch.log_softmax(given.logits.float(), dim=1)
        logp = scores.gather(1, problem.targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        return loss_of(KIND, logp[problem.rows], problem)

    return run
