"""TRL's Triton log-prob and entropy of given logits, with its mask of rows; loss in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from loss_truth import Kind, loss_of

from loss_peers.unsupported import Unsupported

if TYPE_CHECKING:
    from loss_given import Given

KIND = Kind.GRPO


def make(given: Given) -> Callable[[], torch.Tensor]:
    """Masked rows are not read by the peer."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    if not given.logits.is_cuda:
        raise Unsupported("needs CUDA")
    problem = given.problem
    targets, mask = problem.targets.clamp(min=0), problem.targets >= 0

    def run() -> torch.Tensor:
        logp, _ = selective_log_softmax_and_entropy(given.logits, targets, row_mask=mask)
        return loss_of(KIND, logp[problem.rows], problem)

    return run
