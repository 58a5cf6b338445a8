"""Plain-torch twin of the row kernel: the oracle of its tests and the path taken on CPU.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch

__all__ = ["IGNORED_TARGET", "row_logprob_reference"]

IGNORED_TARGET = -100
"""Target of a row that is not asked about, as in ``torch.nn.functional.cross_entropy``."""


def row_logprob_reference(
    logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """[C] float32 log-prob of ``targets`` [C] int64 under float32 ``logits`` [C, V].

    The softmax is anchored at the target: with ``d_j = (z_j - z_y) / temperature`` and ``S`` the
    sum of ``exp(d_j)`` over ``j != y``, ``logp = -log1p(S)``. That is never positive, keeps its
    relative precision as p goes to 1, and a common offset of the logits cancels before it can
    round anything away. Where ``S`` overflows (logp below -88) or the target's logit is not finite,
    ``log_softmax`` takes over; its special values are the ones we promise.
    """
    vocab = logits.shape[1]
    if bias is not None:
        logits = logits + bias.float()
    valid = (targets >= 0) & (targets < vocab)
    column = torch.where(valid, targets, 0).unsqueeze(1)
    anchor = logits.gather(1, column)
    distance = ((logits - anchor) / temperature).scatter_(1, column, -torch.inf)
    total = distance.exp_().sum(dim=1)
    logp = -torch.log1p(total)
    plain = ~(total < torch.inf) | ~(anchor.squeeze(1) < torch.inf)
    if bool(plain.any()):
        rows = plain.nonzero().squeeze(1)
        scores = torch.log_softmax(logits[rows] / temperature, dim=1)
        logp[rows] = scores.gather(1, column[rows]).squeeze(1)
    logp = torch.where(valid, logp, torch.nan)
    return torch.where(targets == IGNORED_TARGET, 0.0, logp)
