"""fused_linear_grpo and logits_grpo against autograd over whole logits, in float64 and below."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.kernels import (
    KL,
    LossSpec,
    fused_linear_grpo,
    hierarchical_grpo_checks,
    linear_grpo_reference,
    logits_grpo,
    logits_grpo_reference,
    register_loss,
)
from thor_fast.kernels.hierarchical_grpo_plan import AGGREGATIONS
from thor_fast.kernels.hierarchical_grpo_spec import BUILT_IN_LOSSES

KINDS = {
    "ppo": LossSpec(),
    "plain": LossSpec(dual_clip=None, nll_alpha=0.0),
    "delta": LossSpec(delta=1.5, dual_clip=None),
    "delta and dual clip": LossSpec(delta=1.4, dual_clip=1.2),
    "gspo": LossSpec(kind="gspo", clip_low=0.05, clip_high=0.05),
    "geo_mean": LossSpec(kind="geo_mean", clip_low=0.4, clip_high=0.4),
    "cispo": LossSpec(kind="cispo"),
    "sapo": LossSpec(kind="sapo", sapo_temperatures=(0.7, 1.3)),
}
TERMS = {
    "k1": {"kl": KL("k1", beta=0.2)},
    "k2": {"kl": KL("k2", beta=0.2, clamp_input=0.3)},
    "k3": {"kl": KL("k3", beta=0.2, clamp_output=0.02)},
    "entropy bonus": {"entropy_coef": 0.05},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "all": {"softcap": 9.0, "logit_scale": -0.7, "entropy_coef": 0.05, "kl": KL(beta=0.3)},
    "tight clamp": {"log_ratio_clamp": 0.3},
    "temperature": {"temperature": 0.7},
}


def difference(one, other):
    """Largest, as a share of the largest value expected."""
    largest = other.detach().abs().max().item()
    return (one.double() - other.double()).abs().max().item() / max(largest, 1e-9)


def compare(batch, spec, plan, *, bound, temperature=None, chunk_rows=3):
    settings = {"bias": batch.bias, "temperature": temperature, "spec": spec}
    args = (batch.hidden, batch.weight, batch.targets, plan, *batch.rows)
    out = fused_linear_grpo(*args, **settings, chunk_rows=chunk_rows)
    truth = linear_grpo_reference(*args, **settings)
    assert abs(out.loss.item() - truth.item()) <= bound * max(1.0, abs(truth.item()))
    if plan.trainable.rows.numel():
        expected = torch.autograd.grad(truth, batch.leaves)
        for got, want in zip(torch.autograd.grad(out.loss, batch.leaves), expected, strict=True):
            # Autograd's 1 - p is only good to the last digit of 1; ours is to that of itself.
            slack = bound * want.abs().max().item() + 1e-13
            assert (got - want).abs().max().item() <= slack
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", ["none", *TERMS])
def test_value_and_gradients_are_those_of_autograd(make_grpo_batch, kind, terms):
    batch = make_grpo_batch(seed=3)
    spec = replace(KINDS[kind], **TERMS.get(terms, {}))
    plan = batch.plan(rollout_weight=batch.rollout_weight, level_weight=(1.0, 0.5))
    compare(batch, spec, plan, bound=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.integers(1, 40),
    hidden=st.integers(1, 9),
    longest=st.integers(1, 9),
    chunk_rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(list(KINDS)),
    terms=st.sampled_from([{}, *TERMS.values()]),
    agg=st.sampled_from(AGGREGATIONS),
    tempered=st.booleans(),
    weighted=st.booleans(),
)
def test_any_shape_and_setting(
    make_grpo_batch,
    vocab,
    hidden,
    longest,
    chunk_rows,
    seed,
    kind,
    terms,
    agg,
    tempered,
    weighted,
):
    batch = make_grpo_batch(vocab, hidden, longest, seed)
    plan = batch.plan(
        agg=agg,
        norm_tokens=50 if agg in ("dr_grpo", "seq-mean-token-sum-norm") else None,
        rollout_weight=batch.rollout_weight if weighted else None,
        level=batch.level[batch.cu_seqlens.diff().clamp(max=1).cumsum(0) % 6],
    )
    temperature = batch.temperature if tempered else None
    spec = replace(KINDS[kind], **terms)
    compare(batch, spec, plan, bound=1e-10, temperature=temperature, chunk_rows=chunk_rows)


def test_the_headline_loss_by_hand(make_grpo_batch):
    """THOR's: PPO with a dual clip, per level, and NLL of what was good; one token at a time."""
    batch = make_grpo_batch(seed=5, drift=1.0)
    logits = batch.hidden @ batch.weight.t() + batch.bias
    logp = torch.log_softmax(logits, 1).gather(1, batch.targets[:, None]).squeeze(1).tolist()
    losses, nll = ([], []), ([], [])
    for s, level in enumerate(batch.level.tolist()):
        a = float(batch.advantages[s])
        for t in range(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1])):
            if not batch.mask[t]:
                continue
            r = math.exp(logp[t] - float(batch.old_logp[t]))
            value = max(-a * r, -a * min(max(r, 0.8), 1.28))
            losses[level].append(min(value, -a * 3) if a < 0 else value)
            if a > 0:
                nll[level].append(-logp[t])
    expected = sum(sum(part) / len(part) for part in losses)
    expected += 0.01 * sum(sum(part) / len(part) for part in nll if part)
    args = (batch.hidden, batch.weight, batch.targets, batch.plan(), batch.old_logp)
    got = fused_linear_grpo(*args, bias=batch.bias)
    assert got.loss.item() == pytest.approx(expected, rel=1e-7)  # weights are float32


# What plain torch costs in the same dtype is what this may: times 2 where both are float32 all
# the way, and a few units in the last place, so that the luck of rounding does not decide.
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 2.0), (torch.bfloat16, 1.0), (torch.float16, 1.0)]
)
@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo", "sapo", "geo_mean"])
@pytest.mark.parametrize("terms", [{}, {"kl": KL(beta=0.1)}, {"entropy_coef": 0.05}])
def test_error_is_no_larger_than_that_of_torch_in_the_same_dtype(
    make_grpo_batch, dtype, share, kind, terms
):
    stored = make_grpo_batch(vocab=515, hidden=48, longest=17, seed=7).to(dtype)
    exact = stored.to(torch.float64)
    spec = replace(LossSpec(kind=kind), **terms)
    plan = stored.plan()

    def both(batch, op):
        loss = op(
            batch.hidden, batch.weight, batch.targets, plan, *batch.rows, spec=spec, bias=batch.bias
        )
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        return loss, *torch.autograd.grad(loss, batch.leaves)

    truth = both(exact, linear_grpo_reference)
    for ours, torchs, want in zip(
        both(stored, fused_linear_grpo), both(stored, linear_grpo_reference), truth, strict=True
    ):
        assert difference(ours, want) <= share * difference(torchs, want) + 4e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BUILT_IN_LOSSES)
def test_logits_that_the_caller_holds(make_grpo_batch, monkeypatch, dtype, kind):
    monkeypatch.setattr(hierarchical_grpo_checks, "_MOST_CHUNK_ROWS", 4)
    batch = make_grpo_batch(seed=9)
    spec = LossSpec(kind=kind, softcap=20.0, logit_scale=0.9, kl=KL(beta=0.1), entropy=True)
    plan = batch.plan(rollout_weight=batch.rollout_weight)
    logits = (batch.hidden @ batch.weight.t() + batch.bias).detach().to(dtype).requires_grad_()
    kept = logits.detach().clone()
    args = (batch.targets, plan, *batch.rows)
    out = logits_grpo(logits, *args, spec=spec, temperature=batch.temperature)
    exact = kept.double().requires_grad_()
    truth = logits_grpo_reference(exact, *args, spec=spec, temperature=batch.temperature)
    (got,), (want,) = torch.autograd.grad(out.loss, logits), torch.autograd.grad(truth, exact)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert out.loss.item() == pytest.approx(truth.item(), rel=min(max(bound, 1e-6), 1e-5))
    assert got.dtype is dtype
    assert difference(got, want) <= bound
    assert torch.equal(logits, kept)


def test_logits_and_head_give_the_same(make_grpo_batch):
    batch = make_grpo_batch(seed=11)
    plan = batch.plan()
    logits = batch.hidden @ batch.weight.t() + batch.bias
    fused = fused_linear_grpo(
        batch.hidden, batch.weight, batch.targets, plan, *batch.rows, bias=batch.bias
    )
    given = logits_grpo(logits, batch.targets, plan, *batch.rows)
    torch.testing.assert_close(given.loss, fused.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(given.logp, fused.logp, rtol=1e-12, atol=1e-13)
    through = torch.autograd.grad(given.loss, batch.leaves)
    for one, other in zip(through, torch.autograd.grad(fused.loss, batch.leaves), strict=True):
        assert difference(one, other) < 1e-13
    assert given.metrics.wait() == pytest.approx(fused.metrics.wait(), rel=1e-11, abs=1e-13)


def _squared(logp, old_logp, advantage, level):
    """A trust region without advantage, on single steps alone: (logp - old)^2 + A logp."""
    gap = logp - old_logp
    here = (level == 1).to(logp.dtype)
    return here * (gap * gap + advantage * logp), here * (2 * gap + advantage)


def test_a_registered_loss(make_grpo_batch):
    batch = make_grpo_batch(seed=13)
    register_loss("squared", _squared)
    plan = batch.plan()
    args = (batch.hidden, batch.weight, batch.targets, plan, *batch.rows)
    spec = LossSpec(kind="squared", nll_alpha=0.0, kl=KL(beta=0.1))
    out = fused_linear_grpo(*args, spec=spec, bias=batch.bias, chunk_rows=4)
    logits = batch.hidden @ batch.weight.t() + batch.bias
    logp = torch.log_softmax(logits, 1).gather(1, batch.targets[:, None]).squeeze(1)
    rows = plan.trainable
    loss, _ = _squared(
        logp[rows.rows], batch.old_logp[rows.rows], rows.advantage.double(), rows.level
    )
    x = (batch.ref_logp - logp)[rows.rows]
    truth = (rows.policy_weight * (loss + 0.1 * (x.exp() - x - 1))).sum()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-12)
    expected = torch.autograd.grad(truth, batch.leaves)
    for got, want in zip(torch.autograd.grad(out.loss, batch.leaves), expected, strict=True):
        assert difference(got, want) <= 1e-12


def test_a_registered_loss_reads_rows_without_advantage_unless_it_says_it_need_not(make_grpo_batch):
    batch = make_grpo_batch(seed=13)

    def linear(logp, old_logp, advantage, level):
        return -advantage * logp, -advantage

    register_loss("all rows", linear)
    register_loss("fewer rows", linear, zero_without_advantage=True)
    args = (batch.hidden, batch.weight, batch.targets, batch.plan(), *batch.rows)
    every = fused_linear_grpo(*args, spec=LossSpec(kind="all rows"))
    fewer = fused_linear_grpo(*args, spec=LossSpec(kind="fewer rows"))
    read = [
        sum(o.metrics.wait()[f"{at}/tokens"] for at in ("episode", "step")) for o in (every, fewer)
    ]
    assert read[0] == int(batch.mask.sum()) > read[1] > 0
    torch.testing.assert_close(every.loss, fewer.loss, rtol=1e-13, atol=0)


def test_a_name_is_registered_once():
    register_loss("once", _squared)
    for name in ("once", "ppo"):
        with pytest.raises(ValueError, match=f"loss '{name}' exists, expected a new name"):
            register_loss(name, _squared)


def test_on_policy_ratios_are_exactly_one(make_grpo_batch):
    batch = make_grpo_batch(seed=17).to(torch.float32)
    plan = batch.plan(mask=torch.ones_like(batch.mask), drop_zero_adv=False)
    args = (batch.hidden, batch.weight, batch.targets, plan)
    old = fused_linear_grpo(*args, torch.zeros_like(batch.old_logp)).logp
    values = fused_linear_grpo(*args, old).metrics.wait()
    for level in ("episode", "step"):
        assert values[f"{level}/ratio"] == 1.0
        assert values[f"{level}/approx_kl"] == 0.0


def test_metrics_are_means_over_the_rows_read(make_grpo_batch):
    batch = make_grpo_batch(seed=19, drift=0.8)
    spec = LossSpec(kl=KL("k2", beta=0.1), entropy=True)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    out = fused_linear_grpo(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.plan(group=group),
        *batch.rows,
        spec=spec,
        chunk_rows=4,
    )
    values = out.metrics.wait()
    scores = torch.log_softmax(batch.hidden @ batch.weight.t(), dim=1).detach()
    logp = scores.gather(1, batch.targets[:, None]).squeeze(1)
    entropy = -(scores.exp() * scores).sum(1)
    sequence = torch.repeat_interleave(torch.arange(6), batch.cu_seqlens.diff())
    adv, x = batch.advantages[sequence].double(), batch.ref_logp - logp
    ratio = (logp - batch.old_logp).exp()
    for index, level in enumerate(("episode", "step")):
        here = batch.mask & (batch.level[sequence] == index)
        clipped = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.28))
        dual = (adv < 0) & (clipped > -3 * adv)
        policy = torch.where(dual, -3 * adv, clipped)
        good = here & (adv > 0)
        expected = {
            "logp": logp,
            "ratio": ratio,
            "log_ratio": logp - batch.old_logp,
            "approx_kl": ratio - 1 - (logp - batch.old_logp),
            "clipped_low": (ratio < 0.8) & (adv < 0),
            "clipped_high": (ratio > 1.28) & (adv > 0),
            "dual_clipped": dual,
            "kl": (x * x / 2).clamp(max=10),
            "entropy": entropy,
            "advantage": adv,
            "positive_advantage": adv > 0,
            "policy_loss": policy,
        }
        for name, per_row in expected.items():
            mean = float(per_row[here].double().mean())
            assert values.pop(f"{level}/{name}") == pytest.approx(mean, rel=1e-6, abs=1e-9), name
        assert values.pop(f"{level}/tokens") == int(here.sum())
        nll = -0.01 * float(logp[good].mean()) if good.any() else 0.0
        assert values.pop(f"{level}/nll") == pytest.approx(nll, rel=1e-6)
        kl = 0.1 * float(expected["kl"][here].mean())
        assert values.pop(f"{level}/kl_loss") == pytest.approx(kl, rel=1e-6)
        whole = float(policy[here].mean()) + nll + kl
        assert values.pop(f"{level}/loss") == pytest.approx(whole, rel=1e-6)
    silent = sum(bool((adv[batch.mask & (group[sequence] == g)] == 0).all()) for g in range(3))
    assert values == {"groups": 3.0, "groups_without_signal": float(silent)}
    assert difference(out.logp[batch.mask], logp[batch.mask]) < 1e-13
    assert difference(out.entropy[batch.mask], entropy[batch.mask]) < 1e-13
    assert not out.logp[~batch.mask].any()
    assert not out.entropy[~batch.mask].any()
