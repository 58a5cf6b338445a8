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

The target's own weight ``E_y`` is kept apart, in full precision. Where the others are rounded, what
that took from their sum is kept too: ``own + rounding`` gives the row the sum it should have, so
that what all rows of a head have in common does not leak into the gradient of the hidden states.

A loss whose derivatives come late, or which goes through the entropy too, takes its gradient from
the logits and ``log(1 + S)`` instead: :func:`logit_gradients`.

:func:`row_sums` and :func:`logit_gradients` are twins of Triton kernels, and the path on CPU.

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
    "SILENT",
    "Anchors",
    "GradientTerms",
    "Rows",
    "Shard",
    "Sums",
    "Weights",
    "anchors_of",
    "finish_rows",
    "gradient_terms",
    "logit_gradients",
    "row_sums",
    "split_target",
]

IGNORED_TARGET = -100
"""Target of a row that is not asked about, as in ``torch.nn.functional.cross_entropy``."""

SILENT = -2
"""In the place of a row's column: its gradient is 0, whatever its logits are."""

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


class Weights(NamedTuple):
    """A gradient by logits, up to a factor of the row, in parts; all of this shard."""

    others: torch.Tensor  # [C, V]: 0 at the target
    own: torch.Tensor  # [C]: the target's; 0 where it is not here
    rounding: torch.Tensor | None  # [C]: what rounding took from the others' sum; None: nothing
    column: torch.Tensor  # [C] int64: the target's; negative where it is not here


class Sums(NamedTuple):
    """Of each row over this shard, held times ``2^-shift``."""

    total: torch.Tensor  # [C]: S
    moment: torch.Tensor | None  # [C]: sum of e_j (d_j - shift log 2), in nats
    shift: torch.Tensor  # [C], whole numbers
    weights: torch.Tensor | None  # [C, V]: E, 0 at the target, times the softcap's slope
    rounding: torch.Tensor | None  # [C]: what rounding took from the weights' sum


class Rows(NamedTuple):
    """Of each row, over all shards."""

    logp: torch.Tensor  # [C]
    entropy: torch.Tensor | None  # [C], in nats
    log_whole: torch.Tensor  # [C]: log of the sum of all e_j, the target's included if it has one
    weights: Weights | None  # ``d logp / d logits`` is ``-factor`` times these
    factor: torch.Tensor  # [C]
    anchors: Anchors


class GradientTerms(NamedTuple):
    """What a row's gradient by its logits is made of; of each row [C]."""

    column: torch.Tensor  # int64: the target's, in this shard; -1 where it is not here; SILENT
    anchor: torch.Tensor  # finished logit
    log_whole: torch.Tensor
    rest: torch.Tensor  # 1 - p of the target
    inverse_temperature: torch.Tensor
    by_logp: torch.Tensor  # the loss's derivative
    entropy: torch.Tensor | None
    by_entropy: torch.Tensor | None  # the loss's derivative; None: it does not depend on it

    def part(self, rows: slice) -> GradientTerms:
        """Those of a chunk."""
        return GradientTerms(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]


def anchors_of(
    logits: torch.Tensor,
    targets: torch.Tensor,
    shard: Shard,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    rows: torch.Tensor | None = None,
) -> Anchors:
    """The targets' logits after bias, scale and softcap, wherever their shard is.

    ``rows`` [C] int64: which of ``logits`` these are; by default all.
    """
    local = targets - shard.start
    here = (local >= 0) & (local < logits.shape[1])
    column = torch.where(here, local, 0)
    if rows is None:
        logit = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    else:
        logit = logits[rows, column]
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
    weights_dtype: torch.dtype | None,
) -> Sums:
    """Of ``logits`` [C, V], after bias and scale; ``None``: the weights are not wanted."""
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = torch.where(logits == -torch.inf, 0.0, 1 - capped * capped)
        logits = torch.where(logits == -torch.inf, logits, capped * softcap)
    # Powers of e: a change of base would round each distance once more.
    distance = (logits - anchors.logit.unsqueeze(1)) * inverse_temperature.unsqueeze(1)
    distance = torch.where(_own(anchors.column, logits), -torch.inf, distance)
    top = distance.amax(dim=1) * _LOG2E
    guarded = torch.where(top > _MOST_POWER, top.ceil(), 0.0)
    shift = torch.where(anchors.lost, top.ceil(), guarded)
    shift = torch.where(shift == -torch.inf, NO_SHIFT_YET, shift)
    shift = torch.where(shift < torch.inf, shift, 0.0)  # the sums are to show inf and NaN
    powers = torch.exp(distance - (shift * _LN2).unsqueeze(1))
    total = powers.sum(dim=1)
    moment = None
    if entropy:
        # Distances to the shift: the entropy of a row far from its anchor is no difference of two
        # large numbers then.
        beyond = torch.where(powers > 0, distance - (shift * _LN2).unsqueeze(1), 0.0)
        moment = (powers * beyond).sum(dim=1)
    if weights_dtype is None:
        return Sums(total, moment, shift, None, None)
    exact = powers if slope is None else powers * slope
    exact.masked_fill_(anchors.ignored.unsqueeze(1), 0.0)
    return Sums(total, moment, shift, *_rounded(exact, weights_dtype))


def _own(column: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[C, V] bool: the target's."""
    return column.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In this dtype, and what that took from each row's sum."""
    if dtype is exact.dtype:
        return exact, None
    rounded = exact.to(dtype)
    return rounded, (exact - rounded).sum(dim=1)


def finish_rows(
    sums: Sums,
    anchors: Anchors,
    inverse_temperature: torch.Tensor,
    shard: Shard,
    *,
    softcap: float | None,
) -> Rows:
    """Add the shards up, and say what the targets' own weights are.

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
        (shift == 0) & ~anchors.lost,
        torch.log1p(whole.total),
        torch.log(denominator) + shift * _LN2,
    )
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
    weights = None
    if sums.weights is not None:
        weights = _with_own(_aligned(sums, shift, shard), anchors, -whole.total, softcap)
    return Rows(logp, entropy, log_whole, weights, factor, anchors)


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
    return sums._replace(
        total=(total * lower).sum(dim=0),
        moment=None if sums.moment is None else moment.sum(dim=0),
        shift=highest,
    )


def _aligned(
    sums: Sums, shift: torch.Tensor, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and rounding of rows that this shard held at another power of two. Rare."""
    weights, rounding, by = sums.weights, sums.rounding, sums.shift - shift
    assert weights is not None
    if shard.group is None or not (weights.is_cuda or bool((by != 0).any())):
        return weights, rounding
    lower = torch.exp2(by)
    weights.mul_(lower.unsqueeze(1).to(weights.dtype))
    return weights, None if rounding is None else rounding * lower


def _with_own(
    weights: tuple[torch.Tensor, torch.Tensor | None],
    anchors: Anchors,
    own: torch.Tensor,
    softcap: float | None,
) -> Weights:
    if softcap is not None:
        slope = 1 - (anchors.logit / softcap).square()
        own = own * torch.where(anchors.lost, 0.0, slope)
    here = (anchors.column >= 0) & ~anchors.ignored
    others, rounding = weights
    return Weights(others, torch.where(here, own, 0.0), rounding, anchors.column)


def gradient_terms(
    rows: Rows,
    inverse_temperature: torch.Tensor,
    by_logp: torch.Tensor,
    by_entropy: torch.Tensor | None,
) -> GradientTerms:
    """For :func:`logit_gradients`, once the loss's derivatives are known."""
    anchors = rows.anchors
    return GradientTerms(
        column=torch.where(anchors.ignored, SILENT, anchors.column),
        anchor=anchors.logit,
        log_whole=rows.log_whole,
        # Without cancellation as p goes to 1.
        rest=torch.where(anchors.lost, 1.0, -torch.expm1(-rows.log_whole)),
        inverse_temperature=inverse_temperature,
        by_logp=by_logp,
        entropy=None if by_entropy is None else rows.entropy,
        by_entropy=by_entropy,
    )


def logit_gradients(
    logits: torch.Tensor, terms: GradientTerms, *, softcap: float | None
) -> torch.Tensor:
    """[C, V]: gradient of the loss by ``logits`` [C, V], which are those after bias and scale.

    ``d logp / d z_j = ((j == y) - p_j) / temperature`` and ``d H / d z_j = -p_j (log p_j + H) /
    temperature``, where ``log p_j = d_j - log_whole``.
    """
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = torch.where(logits == -torch.inf, 0.0, 1 - capped * capped)
        logits = torch.where(logits == -torch.inf, logits, capped * softcap)
    score = (logits - terms.anchor.unsqueeze(1)) * terms.inverse_temperature.unsqueeze(1)
    score -= terms.log_whole.unsqueeze(1)
    chances = score.exp()
    own = _own(terms.column, logits)
    gradient = torch.where(own, terms.rest.unsqueeze(1), -chances) * terms.by_logp.unsqueeze(1)
    if terms.by_entropy is not None:
        assert terms.entropy is not None
        spread = torch.where(chances > 0, chances * (score + terms.entropy.unsqueeze(1)), 0.0)
        gradient -= terms.by_entropy.unsqueeze(1) * spread
    gradient *= terms.inverse_temperature.unsqueeze(1)
    if slope is not None:
        gradient *= slope
    return gradient.masked_fill_((terms.column == SILENT).unsqueeze(1), 0.0)


def split_target(gradient: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> Weights:
    """A gradient [C, V] in parts, that of the columns ``target`` [C] kept apart; it is used up."""
    here = target >= 0
    at = target.clamp(min=0).unsqueeze(1)
    present = gradient.gather(1, at)
    own = torch.where(here, present.squeeze(1), 0.0)
    gradient.scatter_(1, at, torch.where(here.unsqueeze(1), 0.0, present))
    others, rounding = _rounded(gradient, dtype)
    return Weights(others, own, rounding, target)
