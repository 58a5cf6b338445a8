"""The three losses that take part, as functions of log-probs, and their float64 gradients.

Legend: N rows that are read, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from loss_problem import Problem

__all__ = ["Kind", "Truth", "errors_of", "loss_of", "truth_of"]

_CHUNK_BYTES = 2**30
_NLL_ALPHA = 0.01


class Kind(enum.Enum):
    """Which loss a backend computes; only equal ones compare."""

    GRPO = "THOR's: PPO with dual clip, NLL on positive tokens"
    CLIPPED = "PPO's clip alone"
    CROSS_ENTROPY = "cross-entropy, no policy ratio"


def loss_of(kind: Kind, logp: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The loss from the log-probs [N] of the rows that are read; differentiable."""
    if kind is Kind.CROSS_ENTROPY:
        return -logp.mean()
    advantage = problem.by_row.to(logp.dtype)
    ratio = (logp - problem.old_logp[problem.rows].to(logp.dtype)).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    if kind is Kind.CLIPPED:
        return loss.mean()
    loss = torch.where(advantage < 0, torch.minimum(loss, -3 * advantage), loss)
    positive = (advantage > 0).to(logp.dtype)
    nll = -(positive * logp).sum() / positive.sum().clamp(min=1)
    return loss.mean() + _NLL_ALPHA * nll


@dataclass(frozen=True)
class Truth:
    """A loss and its gradients, from float64 operands; kept in float32, which is room enough."""

    loss: float
    by_hidden: torch.Tensor  # [T, H]
    by_weight: torch.Tensor  # [V, H]


def truth_of(kind: Kind, problem: Problem) -> Truth:
    """In chunks, twice over the rows: log-probs first, then gradients."""
    hidden = problem.hidden.detach()[problem.rows].double()
    weight = problem.weight.detach().double()
    targets = problem.targets[problem.rows].unsqueeze(1)
    size = max(1, _CHUNK_BYTES // (8 * problem.shape.vocab))
    parts = [slice(at, at + size) for at in range(0, len(hidden), size)]
    logp = torch.cat(
        [(hidden[p] @ weight.t()).log_softmax(1).gather(1, targets[p]).squeeze(1) for p in parts]
    ).requires_grad_()
    loss = loss_of(kind, logp, problem)
    (by_logp,) = torch.autograd.grad(loss, logp)
    by_weight = torch.zeros_like(weight)
    by_hidden = torch.zeros_like(problem.hidden, dtype=torch.float32)
    for part in parts:
        gradient = -(hidden[part] @ weight.t()).softmax(1)
        gradient.scatter_add_(1, targets[part], torch.ones_like(targets[part], dtype=weight.dtype))
        gradient *= by_logp[part].unsqueeze(1)
        by_hidden[problem.rows[part]] = (gradient @ weight).float()
        by_weight += gradient.t() @ hidden[part]
    return Truth(float(loss.detach()), by_hidden, by_weight.float())


def errors_of(loss: torch.Tensor, problem: Problem, truth: Truth) -> dict[str, float]:
    """The loss's distance, the gradients' relative ones, where a gradient was asked for.

    The loss is held against 1, the size of an advantage: near a policy's own samples it is 0.
    """
    errors = {"loss": abs(float(loss.detach()) - truth.loss) / max(1.0, abs(truth.loss))}
    for name, leaf, expected in (
        ("by_hidden", problem.hidden, truth.by_hidden),
        ("by_weight", problem.weight, truth.by_weight),
    ):
        if leaf.grad is not None:
            distance = (leaf.grad.float() - expected).norm()
            errors[name] = float(distance / expected.norm().clamp(min=1e-30))
    return errors
