"""QuACK's chunked linear cross-entropy, scaled-exp where it can: plain cross-entropy, all rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind

from loss_peers.unsupported import Unsupported

KIND = Kind.CROSS_ENTROPY


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Its own choice between its pipelines."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if not problem.hidden.is_cuda:
        raise Unsupported("needs CUDA")

    def run() -> torch.Tensor:
        return chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets)

    return run
