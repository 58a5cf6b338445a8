"""Ours: ``logits_grpo`` with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from loss_truth import Kind

from thor_fast.kernels import logits_grpo

if TYPE_CHECKING:
    from loss_given import Given

KIND = Kind.GRPO


def make(given: Given) -> Callable[[], torch.Tensor]:
    """The plan is made before, as a collator does."""
    problem = given.problem

    def run() -> torch.Tensor:
        return logits_grpo(given.logits, problem.targets, problem.plan, problem.old_logp).loss

    return run
