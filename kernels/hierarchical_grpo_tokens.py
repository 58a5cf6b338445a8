"""Loss and derivative of each token, given its log-prob: everything after the vocabulary is gone.

The twin of the Triton token kernel, and the path on CPU. All in the dtype of ``logp``.

Legend: N rows of the call, B sequences among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .hierarchical_grpo_plan import LEVELS, Selection
from .hierarchical_grpo_spec import BUILT_IN_LOSSES, KL, LossSpec

__all__ = [
    "METRICS",
    "PolicyLoss",
    "TokenLoss",
    "TokenTerms",
    "policy_loss",
    "register_loss",
    "token_terms",
]

METRICS = (
    "tokens",
    "loss",
    "policy_loss",
    "nll",
    "kl_loss",
    "logp",
    "ratio",
    "log_ratio",
    "approx_kl",
    "clipped_low",
    "clipped_high",
    "dual_clipped",
    "kl",
    "entropy",
    "advantage",
    "positive_advantage",
)
"""Columns of a level's metrics: sums over the rows that were read, see ``Metrics``."""


class PolicyLoss(NamedTuple):
    """Of each row: the loss, its derivative by ``logp``, and which bound was in effect."""

    loss: torch.Tensor
    derivative: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    dual_clipped: torch.Tensor


TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]
"""``(logp, old_logp, advantage, level)``, each [N], to ``(loss, derivative by logp)``, each [N]."""


@dataclass(frozen=True, slots=True)
class _Registered:
    fn: TokenLoss
    depends_on_advantage: bool


_registered: dict[str, _Registered] = {}


def register_loss(name: str, fn: TokenLoss, *, zero_without_advantage: bool = False) -> None:
    """Make ``LossSpec(kind=name)`` mean this token-wise loss; once per name.

    Args:
        name: not one of the built-in kinds.
        fn: gets ``(logp, old_logp, advantage, level)``, all [N], the first three of the dtype the
            logits have, on their device; gives the loss and its derivative by ``logp``, both [N].
            Rows are independent of each other.
        zero_without_advantage: both are 0 wherever the advantage is: such rows need not be read.

    Raises:
        ValueError: the name is taken.
    """
    if name in BUILT_IN_LOSSES or name in _registered:
        raise ValueError(f"loss {name!r} exists, expected a new name")
    _registered[name] = _Registered(fn, zero_without_advantage)


def depends_on_advantage(kind: str) -> bool:
    """Whether rows without advantage have neither value nor gradient.

    Raises:
        ValueError: there is no such loss.
    """
    if kind in BUILT_IN_LOSSES:
        return True
    if kind in _registered:
        return _registered[kind].depends_on_advantage
    known = ", ".join((*BUILT_IN_LOSSES, *_registered))
    raise ValueError(f"kind is {kind!r}, expected one of {known} or a registered loss")


class TokenTerms(NamedTuple):
    """What the token stage gives: the weighted sum's parts."""

    derivative: torch.Tensor  # [N]: of the whole loss by logp, weights included
    metrics: torch.Tensor  # [2, len(METRICS)]: sums over the rows of a level


def token_terms(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    selection: Selection,
    spec: LossSpec,
) -> TokenTerms:
    """The loss of each row [N], its derivative, and the sums per level."""
    dtype = logp.dtype
    advantage = selection.advantage.to(dtype)
    weight, term_weight, nll_weight = (
        part.to(dtype)
        for part in (selection.policy_weight, selection.term_weight, selection.nll_weight)
    )
    policy = policy_loss(logp, old_logp, selection, spec)
    zero = torch.zeros_like(logp)
    kl, kl_derivative = (zero, zero) if spec.kl is None else _kl(logp, ref_logp, spec.kl)
    beta = 0.0 if spec.kl is None else spec.kl.beta
    entropy = zero if entropy is None else entropy
    policy_term = _times(weight, policy.loss)
    nll_term = _times(-spec.nll_alpha * nll_weight, logp)
    kl_term = beta * term_weight * kl
    loss = policy_term + nll_term + kl_term - spec.entropy_coef * term_weight * entropy
    derivative = (
        weight * policy.derivative
        - spec.nll_alpha * nll_weight
        + beta * term_weight * kl_derivative
    )
    # A clip's derivative is 0 also where its argument is NaN: a broken row is not to pass quietly.
    derivative = torch.where(loss.isnan(), loss, derivative)
    log_ratio = logp - old_logp
    columns = {
        "tokens": torch.ones_like(logp),
        "loss": loss,
        "policy_loss": policy_term,
        "nll": nll_term,
        "kl_loss": kl_term,
        "logp": logp,
        "ratio": policy.ratio,
        "log_ratio": log_ratio,
        "approx_kl": torch.expm1(log_ratio.clamp(max=spec.log_ratio_clamp)) - log_ratio,
        "clipped_low": policy.clipped_low.to(dtype),
        "clipped_high": policy.clipped_high.to(dtype),
        "dual_clipped": policy.dual_clipped.to(dtype),
        "kl": kl,
        "entropy": entropy,
        "advantage": advantage,
        "positive_advantage": (advantage > 0).to(dtype),
    }
    values = torch.stack([columns[name] for name in METRICS], dim=1)
    # No product with a matrix of zeros and ones: 0 * inf is NaN, and a GEMM may run in TF32.
    ours = selection.level == torch.arange(LEVELS, device=logp.device)[:, None]
    return TokenTerms(derivative, torch.where(ours[:, :, None], values, 0.0).sum(dim=1))


def _times(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where the weight is: a log-prob may be -inf."""
    return torch.where(weight != 0, weight * values, 0.0)


def policy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, selection: Selection, spec: LossSpec
) -> PolicyLoss:
    """The loss before its weight; see :class:`LossSpec` for the formulas."""
    advantage = selection.advantage.to(logp.dtype)
    if spec.kind in _registered:
        loss, derivative = _registered[spec.kind].fn(logp, old_logp, advantage, selection.level)
        never = torch.zeros_like(logp, dtype=torch.bool)
        ratio = (logp - old_logp).clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp).exp()
        return PolicyLoss(loss, derivative, ratio, never, never, never)
    match spec.kind:
        case "ppo":
            log_ratio, free = _clamped(logp - old_logp, spec.log_ratio_clamp)
            return _ppo(log_ratio.exp(), free, advantage, spec)
        case "gspo":
            mean = _sequence_mean(logp - old_logp, selection)
            log_ratio, free = _clamped(mean, spec.log_ratio_clamp)
            return _ppo(log_ratio.exp(), free, advantage, spec)
        case "geo_mean":
            return _geo_mean(logp - old_logp, advantage, selection, spec)
        case "cispo":
            return _cispo(logp, old_logp, advantage, spec)
        case "sapo":
            return _sapo(logp, old_logp, advantage, spec)
        case _:
            raise ValueError(f"kind is {spec.kind!r}, expected a known loss")


def _clamped(values: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Within the bound, and where the gradient passes."""
    return values.clamp(-bound, bound), values.abs() <= bound


def _ppo(
    ratio: torch.Tensor, free: torch.Tensor, advantage: torch.Tensor, spec: LossSpec
) -> PolicyLoss:
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    plain, other = -advantage * bounded, -advantage * clipped
    loss = torch.maximum(plain, other)
    moves = free & (bounded == ratio)
    low = (ratio < 1 - spec.clip_low) & (advantage < 0)
    high = (ratio > 1 + spec.clip_high) & (advantage > 0)
    moves &= ~(low | high)
    dual = torch.zeros_like(low)
    if spec.dual_clip is not None:
        most = -advantage * spec.dual_clip
        dual = (advantage < 0) & (loss > most)
        loss = torch.where(dual, most, loss)
        moves &= ~dual
    derivative = torch.where(moves, -advantage * ratio, torch.zeros_like(ratio))
    return PolicyLoss(loss, derivative, ratio, low, high, dual)


def _cispo(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, spec: LossSpec
) -> PolicyLoss:
    ratio = _clamped(logp - old_logp, spec.log_ratio_clamp)[0].exp()
    high = (ratio > 1 + spec.clip_high) & (advantage > 0)
    factor = -advantage * ratio.clamp(max=1 + spec.clip_high)
    never = torch.zeros_like(high)
    return PolicyLoss(_times(factor, logp), factor, ratio, never, high, never)


def _sapo(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, spec: LossSpec
) -> PolicyLoss:
    log_ratio, free = _clamped(logp - old_logp, spec.log_ratio_clamp)
    ratio = log_ratio.exp()
    positive, other = (torch.full_like(ratio, t) for t in spec.sapo_temperatures)
    temperature = torch.where(advantage > 0, positive, other)
    gate = torch.sigmoid(temperature * (ratio - 1))
    slope = 4 * gate * (1 - gate) * ratio
    derivative = torch.where(free, -advantage * slope, torch.zeros_like(ratio))
    never = torch.zeros_like(free)
    return PolicyLoss(-advantage * 4 / temperature * gate, derivative, ratio, never, never, never)


def _geo_mean(
    log_ratio: torch.Tensor, advantage: torch.Tensor, selection: Selection, spec: LossSpec
) -> PolicyLoss:
    """GMPO: the pessimistic side of each token's clipped log-ratio, then the sequence's mean."""
    clipped = log_ratio.clamp(-spec.clip_low, spec.clip_high)
    sign = advantage.sign()
    worst = torch.minimum(sign * log_ratio, sign * clipped) * sign
    moves = (worst == log_ratio) & (sign != 0)
    mean = _sequence_mean(worst, selection)
    bounded, free = _clamped(mean, spec.log_ratio_clamp)
    ratio = bounded.exp()
    loss = -_sequence_mean(advantage, selection) * ratio
    derivative = torch.where(moves & free, loss, torch.zeros_like(loss))
    never = torch.zeros_like(moves)
    low, high = (log_ratio < worst) & ~moves, (log_ratio > worst) & ~moves
    return PolicyLoss(loss, derivative, ratio, low, high, never)


def _sequence_mean(values: torch.Tensor, selection: Selection) -> torch.Tensor:
    """[N]: each row's sequence's mean over its rows, added in a fixed order."""
    # Unsafe: without a check of the bounds, which are the plan's own; it would wait for the device.
    means = torch.segment_reduce(values, "mean", offsets=selection.bounds, unsafe=True)
    return means[selection.sequence]


def _kl(
    logp: torch.Tensor, ref_logp: torch.Tensor | None, kl: KL
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N]: the estimate and its derivative by ``logp``."""
    assert ref_logp is not None
    x, free = _clamped(ref_logp - logp, kl.clamp_input)
    if kl.kind == "k1":
        value, slope = -x, torch.ones_like(x)
    elif kl.kind == "k2":
        value, slope = x * x / 2, -x
    else:
        value, slope = torch.expm1(x) - x, -torch.expm1(x)
    bounded, within = _clamped(value, kl.clamp_output)
    return bounded, torch.where(free & within, slope, torch.zeros_like(slope))
