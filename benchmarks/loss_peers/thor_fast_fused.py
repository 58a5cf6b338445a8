"""Ours: ``fused_linear_grpo`` with its defaults, on the packed batch as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind

from thor_fast.kernels import fused_linear_grpo

KIND = Kind.GRPO


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """The plan is made before, as a collator does."""

    def run() -> torch.Tensor:
        return fused_linear_grpo(
            problem.hidden, problem.weight, problem.targets, problem.plan, problem.old_logp
        ).loss

    return run
