"""``F.linear_cross_entropy`` of torch >= 2.13 with its chunks: plain cross-entropy, all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from loss_problem import Problem
from loss_truth import Kind

from loss_peers.unsupported import Unsupported

KIND = Kind.CROSS_ENTROPY


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Rows that are not read are ignored targets."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"needs torch >= 2.13, this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()

    def run() -> torch.Tensor:
        return F.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, options=options
        )

    return run
