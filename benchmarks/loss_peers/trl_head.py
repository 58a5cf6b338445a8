"""TRL's fused head: chunked log-probs with a recomputing backward, its loss in plain torch.

TRL keeps the rows of the completion, tool output included; here it gets the rows that are read,
which is to its advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from loss_problem import Problem
from loss_truth import Kind, loss_of

KIND = Kind.GRPO
_VOCABULARY_TILE = 32768  # trl/trainer/utils.py, 1.16


def make(problem: Problem) -> Callable[[], torch.Tensor]:
    """Log-probs alone are asked for, as TRL does without entropy."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets = problem.targets[problem.rows]

    def run() -> torch.Tensor:
        logp, *_ = ChunkedLogProbFunction.apply(
            problem.hidden[problem.rows],
            problem.weight,
            None,
            targets,
            1.0,
            _VOCABULARY_TILE,
            None,
            1.0,
            (),
        )
        return loss_of(KIND, logp, problem)

    return run
