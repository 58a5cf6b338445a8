"""The loss written down plainly: whole logits, autograd, any dtype. The oracle of every path."""

from __future__ import annotations

import torch

from .hierarchical_grpo_plan import Plan
from .hierarchical_grpo_spec import LossSpec
from .hierarchical_grpo_tokens import depends_on_advantage

__all__ = ["linear_grpo_reference", "logits_grpo_reference"]


def linear_grpo_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    spec: LossSpec | None = None,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of ``fused_linear_grpo`` by autograd, in the inputs' dtype; built-in kinds only."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    return logits_grpo_reference(
        logits, targets, plan, old_logp, ref_logp, spec=spec, temperature=temperature
    )


def logits_grpo_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    spec: LossSpec | None = None,
    temperature: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of ``logits_grpo`` by autograd, in the logits' dtype; built-in kinds only."""
    spec = LossSpec() if spec is None else spec
    dtype = logits.dtype
    chosen = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    rows = chosen.rows
    scores = logits[rows] * spec.logit_scale
    if spec.softcap is not None:
        # What is out of the distribution stays out of it.
        capped = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = torch.where(scores == -torch.inf, scores, capped)
    divisor = spec.temperature if temperature is None else temperature[rows, None].to(dtype)
    scores = torch.log_softmax(scores / divisor, dim=1)
    asked = targets[rows] != -100
    logp = scores.gather(1, targets[rows].long().clamp(min=0).unsqueeze(1)).squeeze(1)
    logp = torch.where(asked, logp, 0.0)
    chosen = chosen.only(asked)
    chances = scores.exp()
    entropy = -(chances * torch.where(chances > 0, scores, 0.0)).sum(dim=1) * asked
    adv = chosen.advantage.to(dtype)
    old = torch.where(asked, old_logp[rows].to(dtype), 0.0)
    per_token = _policy(logp, old, adv, chosen.bounds, chosen.sequence, spec)
    term = chosen.term_weight.to(dtype)
    loss = (chosen.policy_weight.to(dtype) * per_token).sum()
    nll = chosen.nll_weight.to(dtype)
    loss = loss - spec.nll_alpha * torch.where(nll != 0, nll * logp, 0.0).sum()
    loss = loss - spec.entropy_coef * (term * entropy).sum()
    if spec.kl is not None:
        assert ref_logp is not None
        ref = torch.where(asked, ref_logp[rows].to(dtype), 0.0)
        x = (ref - logp).clamp(-spec.kl.clamp_input, spec.kl.clamp_input)
        estimate = {"k1": -x, "k2": x * x / 2, "k3": torch.exp(x) - x - 1}[spec.kl.kind]
        bounded = estimate.clamp(-spec.kl.clamp_output, spec.kl.clamp_output)
        loss = loss + spec.kl.beta * (term * bounded).sum()
    return loss


def _policy(
    logp: torch.Tensor,
    old: torch.Tensor,
    adv: torch.Tensor,
    bounds: torch.Tensor,
    sequence: torch.Tensor,
    spec: LossSpec,
) -> torch.Tensor:
    lengths = bounds.diff().to(logp.dtype)
    bound = spec.log_ratio_clamp

    def sequence_mean(values: torch.Tensor) -> torch.Tensor:
        total = values.new_zeros(len(lengths)).index_add(0, sequence, values)
        return (total / lengths)[sequence]

    log_ratio = logp - old
    if spec.kind == "geo_mean":
        sign = adv.sign()
        clipped = log_ratio.clamp(-spec.clip_low, spec.clip_high)
        worst = torch.minimum(sign * log_ratio, sign * clipped) * sign
        # Its gradient reaches each token whole; the weight divides by the sequence's length.
        mean = sequence_mean(worst).detach() + worst - worst.detach()
        return -sequence_mean(adv) * mean.clamp(-bound, bound).exp()
    if spec.kind == "gspo":
        log_ratio = sequence_mean(log_ratio).detach() + logp - logp.detach()
    ratio = log_ratio.clamp(-bound, bound).exp()
    if spec.kind == "cispo":
        return -adv * ratio.detach().clamp(max=1 + spec.clip_high) * logp
    if spec.kind == "sapo":
        positive, other = spec.sapo_temperatures
        t = torch.where(adv > 0, torch.full_like(adv, positive), torch.full_like(adv, other))
        return -adv * 4 / t * torch.sigmoid(t * (ratio - 1))
    bounded = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    loss = torch.maximum(-adv * bounded, -adv * clipped)
    if spec.dual_clip is not None:
        loss = torch.where(adv < 0, torch.minimum(loss, -adv * spec.dual_clip), loss)
    return loss
