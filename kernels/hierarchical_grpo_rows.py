"""The vocabulary's stage in plain torch: log-prob, entropy and gradient of each row of logits.

The twin of the Triton row kernels, and the path on CPU.

The softmax is anchored at the target ``y``: with ``d_j = (z_j - z_y) / temperature``, ``e_j =
exp(d_j)`` and ``S`` the sum of ``e_j`` over ``j != y``,

    logp = -log1p(S)          d logp / d z_j = -c E_j,  E_j = e_j (j != y),  E_y = -S,
                              c = 1 / (temperature (1 + S))

so ``logp`` is never positive, nothing cancels as p goes to 1, a common offset of the logits is gone
before it can round anything away, and the row's factor ``c`` stays outside of the GEMMs that read
``E``. Where the largest ``e_j`` would pass 2^86 the row is shifted by a power of two ``k``: ``E``
holds ``2^-k`` times the above, and ``c = 1 / (temperature (2^-k + 2^-k S))``.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = ["IGNORED_TARGET", "Rows", "anchored_rows", "logit_gradients"]

IGNORED_TARGET = -100
"""Target of a row that is not asked about, as in ``torch.nn.functional.cross_entropy``."""

_LOG2E = math.log2(math.e)
_MOST_POWER = 86.0
"""Of two: the sum of a large vocabulary's squares still fits float32."""


class Rows(NamedTuple):
    """Of each row; ``weights`` in the place of the logits."""

    logp: torch.Tensor  # [C]
    entropy: torch.Tensor | None  # [C], in nats
    weights: torch.Tensor  # [C, V]: E above, times the slope of the softcap
    factor: torch.Tensor  # [C]: c above


def anchored_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: torch.Tensor,
    *,
    softcap: float | None,
    entropy: bool,
) -> Rows:
    """Log-prob of ``targets`` [C] int64 under ``logits`` [C, V], which are used up.

    A row whose target is ``IGNORED_TARGET`` has log-prob, entropy and gradient 0; one whose target
    is outside of the vocabulary NaN. Entries of -inf are out of the distribution; a target at -inf
    gives -inf; NaN or +inf in a row gives NaN.
    """
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = torch.where(logits == -torch.inf, 0.0, 1 - capped * capped)
        logits = torch.where(logits == -torch.inf, logits, capped * softcap)
    column = torch.where((targets >= 0) & (targets < logits.shape[1]), targets, 0).unsqueeze(1)
    anchor = logits.gather(1, column)
    distance = (logits - anchor) * inverse_temperature.unsqueeze(1)
    distance.scatter_(1, column, -torch.inf)
    top = distance.amax(dim=1) * _LOG2E
    shift = torch.where(top > _MOST_POWER, top.ceil(), 0.0)  # a power of two
    shift = torch.where(torch.isfinite(shift), shift, 0.0)
    weights = torch.exp2(distance * _LOG2E - shift.unsqueeze(1))
    total = weights.sum(dim=1)
    one = torch.exp2(-shift)
    logp = torch.where(
        shift > 0, -(torch.log(one + total) + shift * math.log(2)), -torch.log1p(total)
    )
    entropy_rows = None
    if entropy:
        finite = torch.where(weights > 0, distance, 0.0)
        entropy_rows = -logp - (weights * finite).sum(dim=1) / (one + total)
    weights.scatter_(1, column, -total.unsqueeze(1))
    rows = Rows(logp, entropy_rows, weights, inverse_temperature / (one + total))
    impossible = (anchor.squeeze(1) == -torch.inf).nonzero().squeeze(1)
    if len(impossible):
        _by_plain_softmax(rows, impossible, logits, column, inverse_temperature)
        top[impossible] = 0.0
    if slope is not None:
        weights.mul_(slope)
    broken = ~((anchor.squeeze(1) < torch.inf) & (top < torch.inf))
    return _with_special_rows(rows, targets, broken)


def _by_plain_softmax(
    rows: Rows,
    which: torch.Tensor,
    logits: torch.Tensor,
    column: torch.Tensor,
    inverse_temperature: torch.Tensor,
) -> None:
    """Where the target is out of the distribution, and so no anchor: as ``log_softmax`` does."""
    scores = torch.log_softmax(logits[which] * inverse_temperature[which, None], dim=1)
    chances = scores.exp()
    rows.logp[which] = scores.gather(1, column[which]).squeeze(1)
    rows.weights[which] = chances.scatter(1, column[which], -1.0)
    rows.factor[which] = inverse_temperature[which]
    if rows.entropy is not None:
        rows.entropy[which] = -(chances * torch.where(chances > 0, scores, 0.0)).sum(dim=1)


def _with_special_rows(rows: Rows, targets: torch.Tensor, broken: torch.Tensor) -> Rows:
    vocab = rows.weights.shape[1]
    outside = (targets < 0) | (targets >= vocab) | broken
    logp = torch.where(outside, torch.nan, rows.logp)
    ignored = targets == IGNORED_TARGET
    rows.weights.masked_fill_(ignored.unsqueeze(1), 0.0)
    entropy = rows.entropy
    if entropy is not None:
        entropy = torch.where(ignored, 0.0, torch.where(outside, torch.nan, entropy))
    factor = torch.where(ignored, 0.0, rows.factor)
    return Rows(torch.where(ignored, 0.0, logp), entropy, rows.weights, factor)


def logit_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: torch.Tensor,
    by_logp: torch.Tensor,
    by_entropy: torch.Tensor,
    *,
    softcap: float | None,
) -> torch.Tensor:
    """[C, V]: gradient by the logits of a loss with these derivatives [C] by logp and entropy.

    Only for losses with a gradient through the entropy, whose row has no common factor:
    ``d H / d z_j = -p_j (log p_j + H) / temperature``.
    """
    original = logits
    if softcap is not None:
        logits = torch.where(logits == -torch.inf, logits, torch.tanh(logits / softcap) * softcap)
    ignored = targets == IGNORED_TARGET
    column = torch.where(ignored, 0, targets).unsqueeze(1)
    scores = torch.log_softmax(logits * inverse_temperature.unsqueeze(1), dim=1)
    chances = scores.exp()
    scores = torch.where(chances > 0, scores, 0.0)
    entropy = -(chances * scores).sum(dim=1, keepdim=True)
    gradient = -chances * (scores + entropy) * by_entropy.unsqueeze(1)
    gradient -= chances * by_logp.unsqueeze(1)
    gradient.scatter_add_(1, column, by_logp.unsqueeze(1))
    gradient *= inverse_temperature.unsqueeze(1)
    if softcap is not None:
        gradient *= torch.where(original == -torch.inf, 0.0, 1 - (logits / softcap).square())
    return gradient.masked_fill_(ignored.unsqueeze(1), 0.0)
