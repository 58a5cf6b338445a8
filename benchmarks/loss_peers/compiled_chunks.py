"""torch.compile'd chunks under activation checkpointing, on the rows that are read only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of
from torch.utils.checkpoint import checkpoint

KIND = Kind.GRPO
_CHUNK = 4096


def _logp(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.t()).float()
    own = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return own - logits.logsumexp(dim=1)


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Compiled once for any number of rows."""
    compiled = torch.compile(_logp, dynamic=True)
    targets = problem.targets[problem.rows]

    def run() -> torch.Tensor:
        hidden = problem.hidden[problem.rows]
        parts = [
            checkpoint(compiled, x, problem.weight, y, use_reentrant=False)
            for x, y in zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
        ]
        return loss_of(KIND, torch.cat(parts), problem)

    return run
