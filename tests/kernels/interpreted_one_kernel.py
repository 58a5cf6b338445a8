"""The loss of given logits in one kernel, under Triton's interpreter.

As interpreted_hierarchical_grpo.py, in a process of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from thor_fast.kernels import (
    IGNORED_TARGET,
    KL,
    LossSpec,
    logits_grpo,
    logits_grpo_reference,
    make_plan,
)
from thor_fast.kernels.hierarchical_grpo_one_kernel import BLOCK, token_settings, token_stage
from thor_fast.kernels.hierarchical_grpo_plan import Selection
from thor_fast.kernels.hierarchical_grpo_tokens import METRICS, token_terms

from .under_interpreter import SCALARS_OF_ARRAYS, TRUNCATED

pytestmark = [pytest.mark.usefixtures("ieee"), SCALARS_OF_ARRAYS]

INF, NAN = math.inf, math.nan
LN2 = math.log(2)

# Bounds that ratios of 1/2, 2 and 4 and differences of 1/4 and 1/2 meet exactly.
EXACT = LossSpec(clip_low=0.5, clip_high=1.0, nll_alpha=0.5)
SPECS = {
    "ppo": EXACT,
    "ppo without dual clip": replace(EXACT, dual_clip=None),
    "ppo, dual clip met exactly": replace(EXACT, dual_clip=4.0),
    "ppo with delta": replace(EXACT, delta=4.0, dual_clip=None),
    "ppo, narrow": replace(EXACT, log_ratio_clamp=0.25),
    "ppo, nothing bounded": LossSpec(log_ratio_clamp=INF, dual_clip=None, nll_alpha=0.0),
    "cispo": replace(EXACT, kind="cispo"),
    "cispo, narrow": replace(EXACT, kind="cispo", log_ratio_clamp=0.25),
    "sapo": replace(EXACT, kind="sapo", sapo_temperatures=(0.5, 2.0)),
    "sapo, narrow": replace(EXACT, kind="sapo", log_ratio_clamp=0.25),
    "k1": replace(EXACT, kl=KL("k1", 0.3, clamp_input=0.25, clamp_output=INF)),
    "k2": replace(EXACT, kl=KL("k2", 0.3, clamp_input=INF, clamp_output=0.125)),
    "k3": replace(EXACT, kind="cispo", kl=KL("k3", 0.3)),
    "k3, nothing bounded": replace(EXACT, kl=KL("k3", 0.3, clamp_input=INF, clamp_output=INF)),
}


@triton.jit
def _token_kernel(
    values_ptr,  # [7, N]
    loss_ptr,
    derivative_ptr,
    log_ratio_clamp,
    low,
    high,
    dual_clip,
    delta,
    positive,
    other,
    nll_alpha,
    beta,
    clamp_input,
    clamp_output,
    kind: tl.constexpr,
    kl_kind: tl.constexpr,
    rows: tl.constexpr,
):
    at = tl.program_id(0)
    loss, derivative = token_stage(
        tl.load(values_ptr + at),
        tl.load(values_ptr + rows + at),
        tl.load(values_ptr + 2 * rows + at),
        tl.load(values_ptr + 3 * rows + at),
        tl.load(values_ptr + 4 * rows + at),
        tl.load(values_ptr + 5 * rows + at),
        tl.load(values_ptr + 6 * rows + at),
        kind,
        kl_kind,
        log_ratio_clamp,
        low,
        high,
        dual_clip,
        delta,
        positive,
        other,
        nll_alpha,
        beta,
        clamp_input,
        clamp_output,
    )
    tl.store(loss_ptr + at, loss)
    tl.store(derivative_ptr + at, derivative)


def _tokens():
    """[7, N] float32: every log-prob with every ratio, and advantages and weights in turn."""
    logps = (0.0, -1e-30, -1e-7, -1e-3, -3.0, -20.0, -90.0, -1e4, -INF, NAN)
    away = (0.0, 1e-7, LN2, -LN2, 2 * LN2, 0.25, -0.25, 0.5, -0.5, 3.0, -3.0, 30.0, -100.0, INF)
    rows = []
    for logp in logps:
        for k, off in enumerate(away):
            old = 0.0 - off if logp == -INF else logp - off
            for advantage in (0.7, -0.7, 0.0):
                weight = (0.5, 0.5, 0.0)[k % 3]
                nll = 0.25 if advantage > 0 and k % 2 else 0.0
                reference = logp - away[(-2 - k) % len(away)] if math.isfinite(logp) else -1.0
                rows.append((logp, old, reference, advantage, weight, 0.5 * (k % 4 > 0), nll))
    return torch.tensor(rows).t().contiguous()


@pytest.mark.parametrize("name", SPECS)
def test_the_token_stage_is_that_of_torch(name):
    spec, values = SPECS[name], _tokens()
    count = values.shape[1]
    loss, derivative = torch.empty(2, count).unbind()
    _token_kernel[(count,)](
        values,
        loss,
        derivative,
        *token_settings(spec).values(),
        kind=spec.kind,
        kl_kind=None if spec.kl is None else spec.kl.kind,
        rows=count,
    )
    logp, old, ref, advantage, policy, term, nll = values
    none = torch.zeros(count, dtype=torch.int64)
    chosen = Selection(none, none, none, none, policy, term, nll, advantage)
    expected = token_terms(logp, old, ref, None, chosen, spec).derivative
    at = METRICS.index("loss")
    losses = [
        token_terms(*(v[k : k + 1] for v in (logp, old, ref)), None, chosen.part(k, k + 1), spec)
        for k in range(0, count, 4)
    ]
    # A gate near 1 leaves few digits of what is missing to 1, the same in both.
    near = {"rtol": 2e-6, "atol": 3e-6 if spec.kind == "sapo" else 1e-9, "equal_nan": True}
    torch.testing.assert_close(derivative, expected, **near)
    values = torch.stack([each.metrics[0, at] for each in losses])
    torch.testing.assert_close(loss[::4], values, **near)
    assert 0 < int(expected.isnan().sum()) < count / 3
    assert 0 < int((expected == 0).sum()) < count


def _batch(vocab, dtype, seed=3, tokens=12):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=gen) < 0.8
    plan = make_plan(
        mask,
        torch.tensor([0, 1, 0]),
        advantages=torch.randn(tokens, generator=gen),
        cu_seqlens=torch.tensor([0, 5, 9, tokens]),
        drop_zero_adv=False,
    )
    logits = (torch.randn(tokens, vocab, generator=gen) * 4).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=gen)
    targets[plan.trainable.rows[1]] = IGNORED_TARGET
    temperature = torch.rand(tokens, generator=gen) + 0.5
    exact = torch.log_softmax(logits.double() / temperature[:, None].double(), dim=1)
    old = exact.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).float()
    old += torch.randn(tokens, generator=gen) * 0.4
    logits[~mask] = NAN  # nobody is to read them
    return logits, (targets, plan, old, old - 0.1), temperature


LOSSES = {
    "ppo": LossSpec(),
    "cispo, k3, entropy's value": LossSpec(kind="cispo", kl=KL("k3", 0.1), entropy=True),
    "sapo, k2, softcap, scale": LossSpec(
        kind="sapo", kl=KL("k2", 0.1), softcap=6.0, logit_scale=-0.8
    ),
    "ppo, delta, k1": LossSpec(delta=1.4, kl=KL("k1", 0.1)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, BLOCK, 2 * BLOCK + 13])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_gradients_agree_with_float64(name, dtype, vocab, factor):
    spec = LOSSES[name]
    logits, rows, temperature = _batch(vocab, dtype)
    more = {"spec": spec, "temperature": temperature}
    leaf, exact = logits.clone().requires_grad_(), logits.double().nan_to_num(0.0).requires_grad_()
    out = logits_grpo(leaf, *rows, impl="triton", **more)
    truth = logits_grpo_reference(exact, *rows, **more)
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(out.loss * factor, leaf)
    (want,) = torch.autograd.grad(truth * factor, exact)
    assert got.dtype is dtype
    bound = {torch.float32: 2e-5, torch.bfloat16: TRUNCATED}[dtype]
    scale = max(float(want.abs().max()), 1e-3)
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=1e-5 * scale)
    # All but the gradient is what it is without one, to the last bit.
    with torch.no_grad():
        silent = logits_grpo(logits, *rows, impl="triton", **more)
    assert torch.equal(silent.logp, out.logp)
    assert torch.equal(silent.entropy, out.entropy)
    assert silent.metrics.wait() == out.metrics.wait()


def test_backward_may_run_again_and_gradients_belong_to_whom_they_are_given():
    logits, rows, _ = _batch(50, torch.float32)
    leaf = logits.requires_grad_()
    loss = logits_grpo(leaf, *rows, impl="triton").loss
    for factor in (1.0, 4.0):
        loss = logits_grpo(leaf, *rows, impl="triton").loss
        leaf.grad = None
        for times in (1, 2, 3):
            (loss * factor).backward(retain_graph=True)
            if times == 1:
                once = leaf.grad.clone()
            torch.testing.assert_close(leaf.grad, once * times, rtol=1e-5, atol=1e-9)
        (last,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(last * factor, once, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("spec", "dtype", "one"),
    [
        (LossSpec(), torch.bfloat16, True),
        (LossSpec(kind="sapo", entropy=True), torch.float32, True),
        (LossSpec(), torch.float16, False),
        (LossSpec(kind="gspo"), torch.bfloat16, False),
        (LossSpec(kind="geo_mean"), torch.float32, False),
        (LossSpec(entropy_coef=0.1), torch.float32, False),
    ],
)
def test_a_factor_of_one_reads_nothing_again(spec, dtype, one):
    """Unless the kernel cannot know the derivative, or the factor never is 1."""
    logits, rows, _ = _batch(50, dtype)
    leaf = logits.nan_to_num(0.0).requires_grad_()
    loss = logits_grpo(leaf, *rows, spec=spec, impl="triton").loss
    leaf.data.fill_(NAN)  # where autograd does not see it
    (kept,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert bool(kept.isfinite().all()) is one
    assert bool(kept.any())
    (again,) = torch.autograd.grad(2 * loss, leaf)
    assert again.isnan().any()


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(kind="cispo", kl=KL("k3", 0.1))])
def test_rows_at_the_edge_are_those_of_torch(spec):
    """A target far off, certain, out of the distribution, or of no vocabulary; broken rows."""
    vocab = 40
    logits = torch.randn(13, vocab, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(13)
    logits[0, 0] = -300.0  # p far below what float32 holds
    logits[1, 1] = 60.0
    logits[2, 2] = 15.0
    logits[3, 3] = -INF
    logits[4] = -INF
    logits[5, 7] = INF
    logits[6, 7] = NAN
    logits[7, 20:] = -INF
    logits[8, 8], logits[8, 9] = -3e38, 3e38
    targets[9], targets[10] = vocab, IGNORED_TARGET
    logits[10] = NAN
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    plan = make_plan(
        torch.ones(13, dtype=torch.bool),
        0,
        advantages=advantages,
        cu_seqlens=torch.tensor([0, 13]),
        drop_zero_adv=False,
    )
    old = torch.full((13,), -3.0)
    old[0], old[8] = -301.0, -INF
    found = []
    for impl in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        out = logits_grpo(leaf, targets, plan, old, old, spec=spec, impl=impl)
        found.append((out.logp, torch.autograd.grad(out.loss, leaf)[0]))
    near = {"rtol": 2e-5, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(found[0][0], found[1][0], **near)
    torch.testing.assert_close(found[0][1], found[1][1], **near)
    gradient = found[0][1]
    assert gradient[[4, 5, 6, 9]].isnan().any(dim=1).all()
    assert gradient[[0, 1, 2, 7, 10, 11, 12]].isfinite().all()
    assert not gradient[10].any()


def test_rows_beyond_two_to_the_31(tmp_path):
    """The stride fits 32 bits, its product with a row does not."""
    stride, vocab = 2**30, 40
    size = 3 * stride + vocab
    whole = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.bfloat16)
    far = whole.as_strided((4, vocab), (stride, 1))
    near = (torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    far.copy_(near)
    plan = make_plan(
        torch.tensor([True, True, False, True]),
        0,
        advantages=torch.ones(4),
        cu_seqlens=torch.tensor([0, 4]),
    )
    rows = (torch.tensor([39, 7, 0, 3]), plan, torch.full((4,), -5.0))
    found = []
    for logits in (far, near):
        leaf = logits.detach().requires_grad_()
        found.append(torch.autograd.grad(logits_grpo(leaf, *rows, impl="triton").loss, leaf)[0])
    assert torch.equal(*found)
    assert found[0].any(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    logits, rows, _ = _batch(50, torch.float32)
    logits = logits.nan_to_num(0.0)

    def step(leaf):
        return logits_grpo(leaf * 1.5, *rows, impl="triton").loss

    torch.compiler.reset()
    for factor in (1.0, 3.0):
        found = []
        for call in (torch.compile(step, backend=backend), step):
            leaf = logits.clone().requires_grad_()
            found.append(torch.autograd.grad(call(leaf) * factor, leaf)[0])
        torch.testing.assert_close(*found)
