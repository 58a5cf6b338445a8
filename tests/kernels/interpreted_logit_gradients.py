"""The gradient by logits, under Triton's interpreter; started by test_triton_interpreter.py.

As interpreted_hierarchical_grpo.py, in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from thor_fast.kernels import (
    IGNORED_TARGET,
    KL,
    LossSpec,
    logits_grpo,
    logits_grpo_reference,
    make_plan,
)
from thor_fast.kernels.hierarchical_grpo_rows import (
    Shard,
    anchors_of,
    finish_rows,
    gradient_terms,
)
from thor_fast.kernels.hierarchical_grpo_triton import (
    BLOCK,
    INTERPRETED,
    in_place_of,
    logit_gradients_triton,
    row_sums_triton,
    split_gradients_triton,
)

from .under_interpreter import HEADS, SCALARS_OF_ARRAYS, TRUNCATED, VOCABS

pytestmark = [pytest.mark.usefixtures("ieee"), SCALARS_OF_ARRAYS]

INF, NAN = math.inf, math.nan


def test_the_interpreter_is_on():
    assert INTERPRETED


def _truth(logits, targets, temperature, by_logp, by_entropy, bias, logit_scale, softcap):
    """[C, V] float64, by autograd."""
    leaf = logits.double().requires_grad_()
    scores = (leaf if bias is None else leaf + bias.double()) * logit_scale
    if softcap is not None:
        capped = torch.tanh(scores / softcap) * softcap
        scores = torch.where(scores == -INF, scores, capped)
    logp = torch.log_softmax(scores / temperature.double()[:, None], dim=1)
    chances = logp.exp()
    entropy = -(chances * torch.where(chances > 0, logp, 0.0)).sum(dim=1)
    asked = targets != IGNORED_TARGET
    own = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    total = (by_logp.double() * own + by_entropy.double() * entropy)[asked].sum()
    return torch.autograd.grad(total, leaf)[0].nan_to_num(0.0)


def _terms(logits, targets, temperature, by_logp, by_entropy, bias, logit_scale, softcap, **where):
    """From the sums of a first pass, which leaves the logits alone."""
    shard, inverse = Shard(0, logits.shape[1], None), 1 / temperature
    anchors = anchors_of(logits, targets, shard, bias, logit_scale, softcap, **where)
    sums = row_sums_triton(
        logits,
        anchors,
        inverse,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        entropy=True,
        weights=None,
        **where,
    )
    rows = finish_rows(sums, anchors, inverse, shard, softcap=softcap)
    return rows, gradient_terms(rows, inverse, by_logp, by_entropy)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_gradients_in_the_place_of_logits_agree_with_float64(vocab, head, dtype, entropy):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, vocab, generator=gen) * 4
    targets = torch.randint(0, vocab, (4,), generator=gen)
    temperature = torch.rand(4, generator=gen) + 0.5
    targets[0], targets[1], targets[2] = 0, IGNORED_TARGET, vocab - 1
    logits[2, : vocab // 2] = -INF
    by_logp, by_entropy = torch.randn(2, 4, generator=gen)
    by_entropy = by_entropy * entropy
    bias = torch.randn(vocab, generator=gen) if head else None
    more = {
        "bias": bias,
        "logit_scale": head.get("logit_scale", 1.0),
        "softcap": head.get("softcap"),
    }
    if head:  # a negative scale would make +inf of it
        logits[2, : vocab // 2] = -9.0
    given = (logits, targets, temperature, by_logp, by_entropy)
    truth = _truth(*given, **more)
    _, terms = _terms(*given, **more)
    if not entropy:
        terms = terms._replace(entropy=None, by_entropy=None)
    got = split_gradients_triton(logits, terms, gradients=in_place_of(logits, dtype), **more)
    assert got.others.data_ptr() == logits.data_ptr()
    at = targets.clamp(min=0)[:, None]
    assert not got.others.gather(1, at).any()
    whole = got.others.double().scatter_add(1, at, got.own.double()[:, None])
    relative = TRUNCATED if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(whole, truth, rtol=relative, atol=4e-6)
    torch.testing.assert_close(got.own.double(), truth.gather(1, at)[:, 0], rtol=1e-5, atol=4e-6)
    assert not whole[1].any()
    if dtype is torch.bfloat16:
        # A row's sum is what it was before rounding.
        total = whole.sum(dim=1) + got.rounding.double()
        torch.testing.assert_close(total, truth.sum(dim=1), rtol=0, atol=2e-5)
    else:
        assert got.rounding is None


def _batch(tokens=13, seed=3):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=gen) < 0.8
    plan = make_plan(
        mask,
        torch.tensor([0, 1, 0]),
        advantages=torch.randn(tokens, generator=gen),
        cu_seqlens=torch.tensor([0, 5, 9, tokens]),
    )
    drift = torch.randn(tokens, generator=gen) * 0.2
    return plan, drift, torch.rand(tokens, generator=gen) + 0.5


SPECS = {
    "ppo": LossSpec(),
    "gspo, softcap, scale": LossSpec(kind="gspo", softcap=6.0, logit_scale=0.8),
    "cispo, KL, entropy's value": LossSpec(kind="cispo", kl=KL("k3", 0.1), entropy=True),
    "entropy's gradient": LossSpec(entropy_coef=0.05, softcap=6.0, temperature=0.7),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_logits_are_read_where_they_lie(name, dtype, strided):
    plan, drift, temperature = _batch()
    spec, vocab = SPECS[name], BLOCK + 9
    gen = torch.Generator().manual_seed(0)
    wide = (torch.randn(13, vocab + 7, generator=gen) * 4).to(dtype)
    targets = torch.randint(0, vocab, (13,), generator=gen)
    targets[plan.trainable.rows[1]] = IGNORED_TARGET
    inactive = torch.ones(13, dtype=torch.bool)
    inactive[plan.trainable.rows] = False
    wide[inactive] = NAN  # nobody is to read them
    logits = wide[:, :vocab] if strided else wide[:, :vocab].contiguous()
    exact = logits.detach().double().nan_to_num(0.0).requires_grad_()
    leaf = logits.detach().requires_grad_()
    assert leaf.stride(0) == (vocab + 7 if strided else vocab)
    rows = (targets, plan, drift - 3, drift - 3.1)
    more = {"spec": spec, "temperature": temperature}
    # A loss scaler's factor, which float16's gradients need.
    out = logits_grpo(leaf, *rows, impl="triton", **more)
    (got,) = torch.autograd.grad(out.loss * 1024, leaf)
    truth = logits_grpo_reference(exact, *rows, **more)
    (want,) = torch.autograd.grad(truth * 1024, exact)
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-6)
    assert got.dtype is dtype
    bound = {torch.float32: 2e-5, torch.bfloat16: TRUNCATED, torch.float16: 2.0**-9}[dtype]
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=1e-5 * scale)
    assert not got[inactive].any()
    assert not got[plan.trainable.rows[1]].any()
    twin = logits_grpo(leaf, *rows, impl="reference", **more)
    torch.testing.assert_close(out.logp, twin.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, twin.entropy, rtol=1e-5, atol=2e-5)


def test_nothing_to_read_and_nothing_at_all():
    for tokens in (0, 4):
        plan = make_plan(
            torch.zeros(tokens, dtype=torch.bool),
            0,
            advantages=torch.ones(1),
            cu_seqlens=torch.tensor([0, tokens]),
        )
        logits = torch.full((tokens, 5), NAN, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64)
        out = logits_grpo(logits, targets, plan, torch.zeros(tokens), impl="triton")
        assert out.loss.item() == 0.0
        (got,) = torch.autograd.grad(out.loss, logits)
        assert torch.equal(got, torch.zeros(tokens, 5))


def _sparse(path, rows, columns, stride):
    """float16, zeros, of which only the pages that are written exist."""
    size = (rows - 1) * stride + columns
    whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    return whole.as_strided((rows, columns), (stride, 1))


def test_sums_of_rows_beyond_two_to_the_31(tmp_path):
    tokens, vocab = 14_200, 151_936
    assert (tokens - 1) * vocab > 2**31
    logits = _sparse(tmp_path / "logits", tokens, vocab, vocab)
    rows = torch.tensor([3, tokens - 1])
    near = (torch.randn(2, vocab, generator=torch.Generator().manual_seed(0)) * 4).half()
    logits[rows] = near
    given = (torch.tensor([vocab - 1, 7]), torch.ones(2), torch.zeros(2), torch.zeros(2))
    far, _ = _terms(logits, *given, None, 1.0, None, rows=rows)
    close, _ = _terms(near, *given, None, 1.0, None)
    assert float(far.logp.max()) < -5
    assert torch.equal(far.logp, close.logp)
    assert torch.equal(far.entropy, close.entropy)


def test_gradients_of_rows_beyond_two_to_the_31(tmp_path):
    """The stride fits 32 bits, its product with a row does not; read as well as written."""
    stride, vocab = 2**30, 40
    logits, gradients = (
        _sparse(tmp_path / name, 4, vocab, stride) for name in ("logits", "gradients")
    )
    near = (torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)) * 4).half()
    logits.copy_(near)
    gradients[2] = 5.0
    rows = torch.tensor([0, 1, 3])
    given = (torch.tensor([39, 7, 0]), torch.ones(3), torch.tensor([1.0, -2.0, 3.0]))
    _, terms = _terms(logits, *given, torch.ones(3), None, 1.0, None, rows=rows)
    index = torch.tensor([0, 1, -1, 2])
    expected = torch.full((4, vocab), 5.0, dtype=torch.float16)
    for source, target in ((logits, gradients), (near, expected)):
        logit_gradients_triton(
            source, terms, logit_scale=1.0, softcap=None, index=index, gradients=target
        )
    assert torch.equal(gradients, expected)
    truth = _truth(near[rows], *given, torch.ones(3), None, 1.0, None)
    torch.testing.assert_close(gradients[rows].double(), truth, rtol=2.0**-9, atol=1e-5)
    assert not gradients[2].any()
    # What a fused call takes back to the GEMMs goes the same way.
    split = split_gradients_triton(
        logits[::3],
        type(terms)(*(values[::2] for values in terms)),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        gradients=gradients[::3],
    )
    assert torch.equal(split.others[1, 1:], expected[3, 1:])
    assert float(split.own[1]) == pytest.approx(float(truth[2, 0]), rel=1e-5)
