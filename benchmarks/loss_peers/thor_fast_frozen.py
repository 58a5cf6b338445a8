"""Ours below a head without gradient, as with LoRA: two GEMMs are all it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind

from thor_fast.kernels import fused_linear_grpo

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """The gradient is the hidden states' alone."""
    weight = problem.weight.detach()

    def run() -> torch.Tensor:
        return fused_linear_grpo(
            problem.hidden, weight, problem.targets, problem.plan, problem.old_logp
        ).loss

    return run
