"""The vocabulary's stage: log-prob, entropy and gradient of each row of logits.

The softmax is anchored at the target ``y``: with ``d_j = (z_j - z_y) / temperature``, ``e_j =
exp(d_j)`` and ``S`` the sum of ``e_j`` over ``j != y``,

    logp = -log1p(S)          d logp / d z_j = -c E_j,  E_j = e_j (j != y),  E_y = -S,
                              c = 1 / (temperature (1 + S))

so ``logp`` is never positive, nothing cancels as p goes to 1, a common offset of the logits is gone
before it can round anything away, and the row's factor ``c`` stays outside of the GEMMs that read
``E``. Sums over parts of a vocabulary simply add, with no maximum to agree on first. Where the
largest ``e_j`` would pass 2^86 the row is shifted by a power of two ``k``: ``E`` and ``S`` are held
times ``2^-k``. A target that is out of the distribution (-inf) is no anchor: 0 is, and ``k`` is
whatever the largest ``e_j`` needs.

:func:`row_sums` is the twin of the Triton kernel, and the path on CPU.

Legend: C rows of a chunk, V vocabulary (of this shard, where it is split), R shards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

__all__ = [
    "IGNORED_TARGET",
    "NO_SHIFT_YET",
    "Anchors",
    "Rows",
    "Shard",
    "Sums",
    "anchors_of",
    "finish_rows",
    "logit_gradients",
    "row_sums",
]

IGNORED_TARGET = -100
"""Target of a row that is not asked about, as in ``torch.nn.functional.cross_entropy``."""

NO_SHIFT_YET = -1e30
"""Of a row without anchor, until its largest entry is known: any shift is above it."""

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
_MOST_POWER = 86.0
"""Of two: the sum of a large vocabulary's squares still fits float32."""


class Shard(NamedTuple):
    """Which columns of the vocabulary are here."""

    start: int
    vocab: int  # of all shards
    group: dist.ProcessGroup | None  # None: there is no other shard


class Anchors(NamedTuple):
    """Of each row [C]."""

    column: torch.Tensor  # int64: the target's, in this shard; -1 where it is not here
    logit: torch.Tensor  # finished; 0 where the target is out of the distribution
    lost: torch.Tensor  # bool: it is
    ignored: torch.Tensor  # bool: nobody asks
    outside: torch.Tensor  # bool: the target is in no shard


class Sums(NamedTuple):
    """Of each row over this shard, held times ``2^-shift``."""

    total: torch.Tensor  # [C]: S
    moment: torch.Tensor | None  # [C]: sum of e_j (d_j - shift log 2), in nats
    shift: torch.Tensor  # [C], whole numbers
    weights: torch.Tensor  # [C, V]: E without the target's, times the softcap's slope


class Rows(NamedTuple):
    """Of each row; ``d logp / d logits`` is ``-factor`` times ``weights``."""

    logp: torch.Tensor  # [C]
    entropy: torch.Tensor | None  # [C], in nats
    weights: torch.Tensor  # [C, V]
    factor: torch.Tensor  # [C]


def anchors_of(
    logits: torch.Tensor,
    targets: torch.Tensor,
    shard: Shard,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Anchors:
    """The targets' logits after bias, scale and softcap, wherever their shard is."""
    local = targets - shard.start
    here = (local >= 0) & (local < logits.shape[1])
    column = torch.where(here, local, 0)
    logit = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    logit = logit.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logit = logit + bias[column].to(logit.dtype)
    logit = logit * logit_scale
    if softcap is not None:
        logit = torch.where(logit == -torch.inf, logit, torch.tanh(logit / softcap) * softcap)
    logit = torch.where(here, logit, 0.0)
    if shard.group is not None:
        dist.all_reduce(logit, group=shard.group)
    lost = logit == -torch.inf
    return Anchors(
        column=torch.where(here, local, -1),
        logit=torch.where(lost, 0.0, logit),
        lost=lost,
        ignored=targets == IGNORED_TARGET,
        outside=(targets < 0) | (targets >= shard.vocab),
    )


def row_sums(
    logits: torch.Tensor,
    anchors: Anchors,
    inverse_temperature: torch.Tensor,
    *,
    softcap: float | None,
    entropy: bool,
) -> Sums:
    """Of ``logits`` [C, V], after bias and scale, which are used up."""
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = torch.where(logits == -torch.inf, 0.0, 1 - capped * capped)
        logits = torch.where(logits == -torch.inf, logits, capped * softcap)
    # Powers of e: a change of base would round each distance once more.
    distance = (logits - anchors.logit.unsqueeze(1)) * inverse_temperature.unsqueeze(1)
    column = anchors.column.unsqueeze(1)
    own = column == torch.arange(logits.shape[1], device=logits.device)
    distance = torch.where(own, -torch.inf, distance)
    top = distance.amax(dim=1) * _LOG2E
    guarded = torch.where(top > _MOST_POWER, top.ceil(), 0.0)
    shift = torch.where(anchors.lost, top.ceil(), guarded)
    shift = torch.where(shift == -torch.inf, NO_SHIFT_YET, shift)
    shift = torch.where(shift < torch.inf, shift, 0.0)  # the sums are to show inf and NaN
    weights = torch.exp(distance - (shift * _LN2).unsqueeze(1))
    total = weights.sum(dim=1)
    moment = None
    if entropy:
        # Distances to the shift: the entropy of a row far from its anchor is no difference of two
        # large numbers then.
        beyond = torch.where(weights > 0, distance - (shift * _LN2).unsqueeze(1), 0.0)
        moment = (weights * beyond).sum(dim=1)
    if slope is not None:
        weights = weights * slope
    return Sums(total, moment, shift, weights.masked_fill_(anchors.ignored.unsqueeze(1), 0.0))


def finish_rows(
    sums: Sums,
    anchors: Anchors,
    inverse_temperature: torch.Tensor,
    shard: Shard,
    *,
    softcap: float | None,
    keep_weights: bool,
) -> Rows:
    """Add the shards up, and put the targets' own weights in their places.

    An ignored row has log-prob, entropy and gradient 0. A target outside of the vocabulary, NaN or
    +inf in a row, or nothing but -inf, gives NaN; a target at -inf gives -inf.
    """
    whole, shift = sums, sums.shift
    if shard.group is not None:
        whole = _over_shards(sums, shard.group)
        shift = whole.shift
    one = torch.where(anchors.lost, 0.0, torch.exp2(-shift))
    denominator = one + whole.total
    log_whole = torch.where(
        shift == 0, torch.log1p(whole.total), torch.log(denominator) + shift * _LN2
    )
    log_whole = torch.where(anchors.lost, torch.log(denominator) + shift * _LN2, log_whole)
    broken = ~(whole.total < torch.inf) | ~(anchors.logit < torch.inf) | (denominator == 0)
    logp = torch.where(anchors.lost, -torch.inf, -log_whole)
    logp = _special(logp, broken, anchors)
    entropy = None
    if whole.moment is not None:
        # The anchor's own distance is 0.
        moment = whole.moment - one * shift * _LN2
        log_here = torch.where(shift == 0, log_whole, torch.log(denominator))
        entropy = _special(log_here - moment / denominator, broken, anchors)
    factor = torch.where(anchors.ignored, 0.0, inverse_temperature / denominator)
    if keep_weights:
        _align(sums.weights, sums.shift - shift)
        _set_targets(sums.weights, anchors, -whole.total, softcap)
    return Rows(logp, entropy, sums.weights, factor)


def _special(values: torch.Tensor, broken: torch.Tensor, anchors: Anchors) -> torch.Tensor:
    values = torch.where(broken | anchors.outside, torch.nan, values)
    return torch.where(anchors.ignored, 0.0, values)


def _over_shards(sums: Sums, group: dist.ProcessGroup) -> Sums:
    """One SUM of slots, so that every shard adds the same numbers in the same order."""
    mine = torch.stack(
        [
            sums.total,
            torch.zeros_like(sums.total) if sums.moment is None else sums.moment,
            sums.shift,
        ]
    )
    slots = mine.new_zeros(dist.get_world_size(group), *mine.shape)
    slots[dist.get_rank(group)] = mine
    dist.all_reduce(slots, group=group)
    total, moment, shift = slots.unbind(dim=1)  # each [R, C]
    highest = shift.amax(dim=0)
    by = shift - highest
    lower = torch.exp2(by)
    moment = (moment + total * by * _LN2) * lower
    return Sums(
        total=(total * lower).sum(dim=0),
        moment=None if sums.moment is None else moment.sum(dim=0),
        shift=highest,
        weights=sums.weights,
    )


def _align(weights: torch.Tensor, by: torch.Tensor) -> None:
    """Give rows whose shard is held at another power of two the one of the whole. Rare."""
    if weights.is_cuda or bool((by != 0).any()):
        weights.mul_(torch.exp2(by).unsqueeze(1).to(weights.dtype))


def _set_targets(
    weights: torch.Tensor, anchors: Anchors, own: torch.Tensor, softcap: float | None
) -> None:
    if softcap is not None:
        slope = 1 - (anchors.logit / softcap).square()
        own = own * torch.where(anchors.lost, 0.0, slope)
    here = (anchors.column >= 0) & ~anchors.ignored
    column = torch.where(here, anchors.column, 0).unsqueeze(1)
    present = weights.gather(1, column).squeeze(1)
    weights.scatter_(1, column, torch.where(here, own.to(weights.dtype), present).unsqueeze(1))


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
    # A target outside has a log-prob of NaN, and so has its derivative: any column shows it.
    inside = (targets >= 0) & (targets < logits.shape[1])
    column = torch.where(inside, targets, 0).unsqueeze(1)
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
