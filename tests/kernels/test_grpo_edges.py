"""Batches, logits and targets at the edge: what is exact there, what is 0, -inf or NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from thor_fast.kernels import (
    KL,
    LossSpec,
    fused_linear_grpo,
    linear_grpo_reference,
    logits_grpo,
    logits_grpo_reference,
    make_plan,
)
from thor_fast.kernels.hierarchical_grpo_spec import BUILT_IN_LOSSES

INF, NAN = math.inf, math.nan
NO_NLL = LossSpec(nll_alpha=0.0)
BONUS = LossSpec(entropy_coef=0.1, nll_alpha=0.0)  # the gradient's other path


def plan_for(tokens, advantages=1.0):
    """One sequence, all of it read."""
    return make_plan(
        torch.ones(tokens, dtype=torch.bool),
        0,
        advantages=torch.as_tensor(advantages).expand(tokens),
        cu_seqlens=torch.tensor([0, tokens]),
        agg="token-sum",
    )


def rows_of(logits, targets, spec=NO_NLL, *, dtype=torch.float32, advantages=1.0, old=None):
    """The call's output for rows of given logits, and its gradient by them."""
    logits = torch.as_tensor(logits, dtype=dtype).requires_grad_()
    targets = torch.as_tensor(targets)
    plan = plan_for(len(targets), advantages)
    old = torch.zeros(len(targets)) if old is None else old
    out = logits_grpo(logits, targets, plan, old, torch.zeros(len(targets)), spec=spec)
    return out, torch.autograd.grad(out.loss, logits)[0]


@pytest.mark.parametrize("kind", BUILT_IN_LOSSES)
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_a_row_the_loss_is_a_connected_zero(kind, coefficient, tokens):
    hidden = torch.full((tokens, 3), NAN, requires_grad=True)
    weight, bias = torch.ones(7, 3, requires_grad=True), torch.ones(7, requires_grad=True)
    plan = make_plan(
        torch.zeros(tokens, dtype=torch.bool),
        0,
        advantages=torch.ones(1),
        cu_seqlens=torch.tensor([0, tokens]),
    )
    spec = LossSpec(kind=kind, entropy_coef=coefficient, kl=KL(beta=0.1))
    nothing = torch.full((tokens,), NAN)
    targets = torch.zeros(tokens, dtype=torch.int64)
    out = fused_linear_grpo(hidden, weight, targets, plan, nothing, nothing, spec=spec, bias=bias)
    out.loss.backward()
    assert out.loss.item() == 0.0
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert set(out.metrics.wait().values()) == {0.0}
    logits = torch.full((tokens, 7), NAN, requires_grad=True)
    given = logits_grpo(logits, targets, plan, nothing, nothing, spec=spec)
    given.loss.backward()
    assert given.loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", BUILT_IN_LOSSES)
@pytest.mark.parametrize("nll_alpha", [0.0, 0.01])
def test_rows_left_out_change_nothing_and_are_not_read(make_grpo_batch, kind, nll_alpha):
    batch = make_grpo_batch(seed=21)
    spec = LossSpec(kind=kind, nll_alpha=nll_alpha)
    dropping = batch.plan(rollout_weight=batch.rollout_weight)
    reading = batch.plan(rollout_weight=batch.rollout_weight, drop_zero_adv=False)
    rows = dropping.select(spec).rows
    assert 0 < len(rows) < len(reading.select(spec).rows) < len(batch.targets)
    out = fused_linear_grpo(
        batch.hidden, batch.weight, batch.targets, reading, batch.old_logp, spec=spec
    )
    expected = torch.autograd.grad(out.loss, batch.leaves[:2])
    # Whatever is elsewhere: had it been read, it would show.
    unread = torch.ones(len(batch.targets), dtype=torch.bool).index_fill(0, rows, False)
    hidden = batch.hidden.detach().masked_fill(unread[:, None], NAN).requires_grad_()
    targets = batch.targets.masked_fill(unread, 10**9)
    old = batch.old_logp.masked_fill(unread, NAN)
    less = fused_linear_grpo(hidden, batch.weight, targets, dropping, old, spec=spec)
    got = torch.autograd.grad(less.loss, (hidden, batch.weight))
    torch.testing.assert_close(less.loss, out.loss, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)
    assert not got[0][unread].any()


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(kind="gspo"), BONUS, LossSpec(kl=KL())])
def test_ignored_targets_add_nothing(make_grpo_batch, spec):
    batch = make_grpo_batch(seed=23)
    plan = batch.plan()
    ignored = torch.arange(len(batch.targets)) % 3 == 0
    batch = replace(
        batch,
        targets=batch.targets.masked_fill(ignored, -100).int(),
        old_logp=batch.old_logp.masked_fill(ignored, NAN),
        ref_logp=batch.ref_logp.masked_fill(ignored, INF),
    )
    args = (batch.hidden, batch.weight, batch.targets, plan, *batch.rows)
    out = fused_linear_grpo(*args, spec=spec, chunk_rows=4)
    truth = linear_grpo_reference(*args, spec=spec)
    leaves = batch.leaves[:2]
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(out.loss, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(truth, leaves), rtol=1e-9, atol=1e-14)
    assert not gradients[0][ignored].any()
    assert not out.logp[ignored].any()
    if not spec.by_sequence:
        # As if those rows had been masked, at the same denominators.
        fewer = batch.plan(mask=batch.mask & ~ignored, normalizer=plan.counts)
        rest = fused_linear_grpo(
            batch.hidden, batch.weight, batch.targets, fewer, *batch.rows, spec=spec
        )
        torch.testing.assert_close(rest.loss, out.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spec", [NO_NLL, BONUS])
def test_padded_columns_of_the_vocabulary_are_out_of_it(make_grpo_batch, spec):
    batch = make_grpo_batch(vocab=29, seed=25)
    plan = batch.plan()
    args = (batch.targets, plan, *batch.rows)
    plain = fused_linear_grpo(batch.hidden, batch.weight, *args, spec=spec, bias=batch.bias)
    expected = torch.autograd.grad(plain.loss, batch.leaves)
    for front in (0, 7):  # behind, as most pad; and a whole leading block
        behind = 7 - front
        pad = torch.nn.functional.pad
        weight = pad(batch.weight.detach(), (0, 0, front, behind), value=3.0).requires_grad_()
        bias = pad(batch.bias.detach(), (front, behind), value=-INF).requires_grad_()
        args = (batch.targets + front, plan, *batch.rows)
        padded = fused_linear_grpo(batch.hidden, weight, *args, spec=spec, bias=bias)
        torch.testing.assert_close(padded.loss, plain.loss, rtol=1e-13, atol=0)
        got = torch.autograd.grad(padded.loss, (batch.hidden, weight, bias))
        inside = slice(front, front + 29)
        trimmed = (got[0], got[1][inside], got[2][inside])
        torch.testing.assert_close(trimmed, expected, rtol=1e-9, atol=1e-14)
        for padded_gradient in got[1:]:
            assert not torch.cat([padded_gradient[:front], padded_gradient[front + 29 :]]).any()


@pytest.mark.parametrize("spec", [NO_NLL, BONUS, replace(NO_NLL, softcap=30.0)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_far_below_the_range_of_exp(spec, scale, dtype):
    """A shift by a power of two keeps sums in range: exp(-logp) overflows float32 at 88."""
    logits = torch.randn(6, 5001, generator=torch.Generator().manual_seed(2), dtype=dtype) * scale
    targets = logits.argmin(dim=1)
    wide = replace(spec, log_ratio_clamp=INF)
    exact = logits.double().requires_grad_()
    scores = exact if spec.softcap is None else torch.tanh(exact / 30) * 30
    logp = torch.log_softmax(scores, dim=1).gather(1, targets[:, None]).squeeze(1).detach()
    out, got = rows_of(logits, targets, wide, dtype=dtype, old=logp)
    plan = plan_for(6)
    truth = logits_grpo_reference(exact, targets, plan, logp, torch.zeros(6), spec=wide)
    (want,) = torch.autograd.grad(truth, exact)
    precision = 1e-6 if dtype is torch.float32 else 1e-13
    torch.testing.assert_close(out.logp.double(), logp, rtol=precision, atol=0)
    # A ratio of two float32 log-probs is only as sharp as they are.
    bound = precision * max(4.0, float(logp.abs().max()))
    assert float((got.double() - want).abs().max()) <= bound
    assert got.isfinite().all()


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 80.0])
def test_as_p_goes_to_one_neither_log_prob_nor_gradient_loses_digits(gap):
    logits = torch.zeros(1, 3)
    logits[0, 0] = gap
    spec = LossSpec(kind="cispo", nll_alpha=0.0)
    out, gradient = rows_of(logits, [0], spec)
    rest = 2 * math.exp(-gap)
    precision = 2**-23 * max(gap, 5.0)  # exp costs its argument's last digit
    assert out.logp.item() == pytest.approx(-math.log1p(rest), rel=precision, abs=0)
    # -r (1 - p), where torch.softmax in float32 gives 1 - p = 0 from a gap of 17 on.
    own = -rest / (1 + rest) ** 2
    assert gradient[0].tolist() == pytest.approx([own, -own / 2, -own / 2], rel=precision, abs=0)


def test_a_common_offset_of_the_logits_is_gone_before_it_rounds_anything():
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)) * 8
    logits = torch.round(logits * 8) / 8  # exact in float32 also after the offset
    spec = LossSpec(entropy=True)
    for offset in (2.0**20, -(2.0**20)):
        plain, expected = rows_of(logits, torch.arange(5), spec)
        shifted, got = rows_of(logits + offset, torch.arange(5), spec)
        assert torch.equal(shifted.loss, plain.loss)
        assert torch.equal(shifted.entropy, plain.entropy)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spec", [NO_NLL, BONUS, replace(NO_NLL, softcap=5.0), LossSpec(kind="gspo")]
)
def test_logits_of_minus_inf_have_no_part(spec, dtype):
    logits = torch.randn(4, 9000, generator=torch.Generator().manual_seed(3), dtype=dtype)
    keep = torch.zeros(9000, dtype=torch.bool)
    keep[torch.tensor([4100, 5000, 8999])] = True  # two whole leading blocks are out, and more
    logits[:, ~keep] = -INF
    targets = torch.tensor([4100, 5000, 8999, 4100])
    out, got = rows_of(logits, targets, spec, dtype=dtype, old=torch.full((4,), -1.0))
    few = torch.tensor([0, 1, 2, 0])
    alone, want = rows_of(logits[:, keep], few, spec, dtype=dtype, old=torch.full((4,), -1.0))
    torch.testing.assert_close(out.loss, alone.loss)
    torch.testing.assert_close(got[:, keep], want)
    assert not got[:, ~keep].any()


SPECIAL = [
    ([-INF, 2.0, -INF], -INF),
    ([0.0, -INF, 0.0], -math.log(2)),
    ([0.0, -1000.0, 500.0], -500.0),
    ([0.0, -1e30, 1e30], -1e30),
    ([-INF, 1e4, -1e4], -INF),
    ([-INF, -INF, -INF], NAN),
    ([1.0, INF, 2.0], NAN),
    ([INF, 1.0, 2.0], NAN),
    ([1.0, NAN, 2.0], NAN),
    ([-INF, NAN, 2.0], NAN),
    ([NAN, 1.0, 2.0], NAN),
]


@pytest.mark.parametrize(("logits", "expected"), SPECIAL)
@pytest.mark.parametrize("spec", [LossSpec(entropy=True), BONUS, LossSpec(kind="cispo")])
def test_special_values_of_one_row_stay_in_it(logits, expected, spec):
    rows = torch.tensor([[0.5, -0.5, 1.0], logits, [1.0, 0.0, -1.0]])
    advantages = torch.tensor([1.0, -1.0, 1.0])  # negative: no NLL where logp may be -inf
    out, gradient = rows_of(rows, [0, 0, 0], spec, advantages=advantages)
    says = torch.log_softmax(rows[1], 0)[0].item()
    assert out.logp[1].item() == pytest.approx(expected, nan_ok=True)
    assert says == pytest.approx(expected, nan_ok=True)
    alone, beside = rows_of(rows[::2], [0, 0], spec)
    assert torch.equal(out.logp[::2], alone.logp)
    torch.testing.assert_close(gradient[::2], beside)
    if math.isnan(expected):
        assert out.loss.isnan()
        assert gradient[1].isnan().all()
    else:
        assert gradient[1].isfinite().all()
        assert out.loss.isfinite() or spec.kind == "cispo"  # whose loss is proportional to logp


def test_what_a_target_at_minus_inf_gives():
    logits = torch.tensor([[-INF, 2.0, 1.0]])
    # The ratio is exp(-20), and its gradient zero: outside of the clamp.
    out, gradient = rows_of(logits, [0], NO_NLL)
    assert out.loss.item() == pytest.approx(-math.exp(-20))
    assert not gradient.any()
    # NLL is infinite; its gradient is that of log_softmax.
    out, gradient = rows_of(logits, [0], LossSpec(nll_alpha=1.0))
    chances = torch.softmax(logits[0], 0)
    assert out.loss.item() == INF
    torch.testing.assert_close(gradient[0], chances - torch.tensor([1.0, 0.0, 0.0]))
    assert out.metrics.wait()["step/loss"] == 0.0  # the other level does not see it


@pytest.mark.parametrize("spec", [NO_NLL, BONUS, LossSpec(kind="gspo")])
@pytest.mark.parametrize("target", [-1, 3, 2**40])
def test_a_target_outside_of_the_vocabulary_is_nan(spec, target):
    out, gradient = rows_of(torch.zeros(2, 3), [target, 0], spec)
    assert out.logp[0].isnan()
    assert out.loss.isnan()
    assert gradient[0].isnan().all()


@pytest.mark.parametrize("spec", [LossSpec(entropy=True), BONUS])
def test_a_vocabulary_of_one(spec):
    out, gradient = rows_of(torch.tensor([[3.0], [-7.0]]), [0, 0], spec)
    assert not out.logp.any()
    assert not out.entropy.any()
    assert not gradient.any()


def test_rows_further_apart_than_32_bits_reach(tmp_path):
    """T * V passes 2^31: by a stride over a sparse file, of which a few pages exist."""
    stride = 2**31 + 8
    shared = str(tmp_path / "logits")
    wide = torch.from_file(shared, shared=True, size=2 * stride + 5, dtype=torch.float16)
    logits = wide.as_strided((3, 5), (stride, 1))
    logits.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(4)))
    near = logits.contiguous()
    far, expected = rows_of(logits, [0, 1, 4], LossSpec(), dtype=torch.float16)
    close, got = rows_of(near, [0, 1, 4], LossSpec(), dtype=torch.float16)
    assert torch.equal(far.loss, close.loss)
    assert torch.equal(got, expected)
