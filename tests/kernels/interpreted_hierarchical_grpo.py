"""The loss's Triton kernels under Triton's interpreter; started by test_triton_interpreter.py.

Not collected by name: ``TRITON_INTERPRET=1`` must be set before the kernels are imported, and a
stray read in the interpreter is a segmentation fault, so this runs in a process of its own. The
interpreter cannot show races, alignment or the rounding of the real device; float32 to bfloat16
it truncates, where a GPU rounds.
"""

from __future__ import annotations

import math

import pytest
import torch

from thor_fast.kernels import (
    IGNORED_TARGET,
    KL,
    LossSpec,
    fused_linear_grpo,
    make_plan,
    selected_logprob,
)
from thor_fast.kernels.hierarchical_grpo_triton import BLOCK, INTERPRETED, in_place_of

from .under_interpreter import HEADS, SCALARS_OF_ARRAYS, TRUNCATED, VOCABS

pytestmark = [pytest.mark.usefixtures("ieee"), SCALARS_OF_ARRAYS]

INF, NAN = math.inf, math.nan


def test_the_interpreter_is_on():
    assert INTERPRETED


def _rows(vocab, rows=4, dtype=torch.float32, scale=4.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=gen) * scale).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=gen)
    targets[0], targets[-1] = 0, vocab - 1
    return logits, targets, torch.rand(rows, generator=gen) + 0.5


def _head(head, vocab):
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(9))
    return head | {"bias": bias if head.get("bias") else None}


def _gradient(rows):
    """[C, V]: of the log-prob by the finished logits."""
    weights = rows.weights
    column = weights.column.clamp(min=0)[:, None]
    whole = weights.others.double().scatter_add(1, column, weights.own.double()[:, None])
    return -whole * rows.factor.double()[:, None]


def _error(got, truth):
    """Largest, relative to what is above 1."""
    return float(((got.double() - truth).abs() / truth.abs().clamp(min=1)).max())


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_sums_are_as_near_to_float64_as_torch_gets(row_stage, vocab, head, dtype):
    logits, targets, temperature = _rows(vocab, dtype=dtype)
    given = logits.clone()
    more = _head(head, vocab) | {"entropy": True}
    truth = row_stage(logits.double(), targets, temperature.double(), **more)
    plain = row_stage(logits, targets, temperature, **more)
    got = row_stage(logits, targets, temperature, triton=True, **more)
    assert torch.equal(logits, given)
    assert float(got.logp.max()) <= 0
    for name in ("logp", "entropy"):
        wanted = getattr(truth, name)
        # One rounding more: distances are taken to base 2, which is what a GPU's exp does too.
        allowed = 2 * _error(getattr(plain, name), wanted) + 2e-6
        assert _error(getattr(got, name), wanted) <= allowed, name


# Rounded weights over float32 logits; and those of the logits' own width.
@pytest.mark.parametrize(
    ("dtype", "over"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "head"])
def test_weights_take_the_place_of_logits(row_stage, vocab, head, dtype, over):
    logits, targets, temperature = _rows(vocab, dtype=over)
    targets[1] = IGNORED_TARGET
    more = _head(head, vocab)
    truth = row_stage(logits.double(), targets, temperature.double(), **more)
    kept = row_stage(logits, targets, temperature, triton=True, **more)
    weights = in_place_of(logits, dtype)
    got = row_stage(logits, targets, temperature, triton=True, weights=weights, **more)
    assert torch.equal(got.logp, kept.logp)
    assert torch.equal(got.factor, kept.factor)
    assert got.weights.others.data_ptr() == logits.data_ptr()
    assert got.weights.others.dtype is dtype
    wanted = _gradient(truth)
    relative = TRUNCATED if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(_gradient(got), wanted, rtol=relative, atol=1e-6)
    assert not _gradient(got)[1].any()
    # Own weight and rounding give the row its exact sum.
    total = got.weights.others.double().sum(dim=1) + got.weights.own.double()
    if dtype is torch.float32:
        assert got.weights.rounding is None
    else:
        total += got.weights.rounding.double()
    exact = truth.weights.others.sum(dim=1) + truth.weights.own
    scale = truth.weights.others.abs().sum(dim=1).clamp(min=1)
    assert float(((total - exact).abs() / scale).max()) < 1e-5


# Powers of two between blocks: each re-anchors; two of three do; the last entries only.
@pytest.mark.parametrize("step", [100.0, 40.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lost", [False, True])
def test_rows_are_shifted_as_often_as_it_takes(row_stage, step, dtype, lost):
    vocab = 4 * BLOCK + 3
    logits, targets, temperature = _rows(vocab, scale=1.0)
    logits += torch.arange(vocab) // BLOCK * step
    logits[:, -2] += 150
    targets[:] = torch.tensor([0, 5, BLOCK, 2 * BLOCK + 1])
    if lost:
        logits[torch.arange(4), targets] = -INF
    more = {"entropy": True}
    truth = row_stage(logits.double(), targets, temperature.double(), **more)
    weights = in_place_of(logits, dtype)
    got = row_stage(logits, targets, temperature, triton=True, weights=weights, **more)
    assert bool(torch.isfinite(got.weights.others).all())
    if lost:
        assert got.logp.tolist() == [-INF] * 4
    else:
        torch.testing.assert_close(got.logp.double(), truth.logp, rtol=1e-6, atol=0)
        assert float(got.logp.max()) < -100
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=0, atol=2e-4)
    relative = TRUNCATED if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(_gradient(got), _gradient(truth), rtol=relative, atol=1e-7)


SPECIAL = [
    [30.0, 0.0, 0.0],
    [0.0, -1000.0, 500.0],
    [0.0, 100.0, 1.0],
    [0.0, -INF, 0.0],
    [-INF, 2.0, -INF],
    [-INF, -INF, -INF],
    [1.0, INF, 2.0],
    [INF, 1.0, 2.0],
    [1.0, NAN, 2.0],
    [-INF, NAN, 2.0],
    [2.0**20, 2.0**20 + 1, 2.0**20 - 1],
]


@pytest.mark.parametrize("softcap", [None, 50.0])
# The row's three entries at its beginning; at its end, behind blocks that are out whole.
@pytest.mark.parametrize("before", [0, 2 * BLOCK])
def test_special_rows_come_out_as_the_twin_has_them(row_stage, before, softcap):
    rows = torch.tensor(SPECIAL)
    logits = torch.cat([torch.full((len(rows), before), -INF), rows], dim=1)
    targets = torch.full((len(rows),), before)
    more = {"softcap": softcap, "entropy": True}
    twin = row_stage(logits, targets, **more)
    weights = in_place_of(logits, torch.float32)
    got = row_stage(logits, targets, triton=True, weights=weights, **more)
    expected = {"rtol": 2e-6, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(got.logp, twin.logp, **expected)
    # The softcap's tanh is a sigmoid in the kernel: off by a few ulps of the cap.
    near = expected if softcap is None else expected | {"atol": 1e-5}
    torch.testing.assert_close(got.entropy, twin.entropy, **near)
    whole = torch.isfinite(twin.entropy)
    assert int(whole.sum()) >= 6
    torch.testing.assert_close(_gradient(got)[whole], _gradient(twin)[whole], **near)


def test_ignored_targets_are_zero_and_wrong_ones_are_nan(row_stage):
    logits, _, _ = _rows(11, rows=5)
    targets = torch.tensor([3, IGNORED_TARGET, 2**40, -(2**40), 11])
    got = row_stage(logits, targets, triton=True, entropy=True)
    assert got.logp[1] == 0.0
    assert got.entropy[1] == 0.0
    assert not torch.signbit(got.logp[1])
    assert got.logp.isnan().tolist() == [False, False, True, True, True]


def test_rows_and_their_values_may_have_strides(row_stage):
    wide = torch.randn(4, 60, generator=torch.Generator().manual_seed(4))
    logits, targets = wide[:, :33], torch.arange(8)[::2]
    temperature, bias = torch.linspace(0.5, 2, 8)[::2], torch.linspace(-1, 1, 66)[::2]
    got = row_stage(logits, targets, temperature, bias=bias, triton=True)
    twin = row_stage(logits, targets, temperature, bias=bias)
    torch.testing.assert_close(got.logp, twin.logp)


def test_no_rows():
    empty = torch.empty(0, 8)
    got = selected_logprob(empty, torch.zeros(5, 8), torch.empty(0).long(), impl="triton")
    assert got.shape == (0,)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_loss_agrees_with_the_twin(make_problem, name, dtype):
    plan, drift, temperature = _batch()
    p = make_problem(13, BLOCK + 9, 16, dtype, bias=True)
    old = p.truth().float() + drift
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        out = fused_linear_grpo(
            *(leaves[0], leaves[1], p.targets, plan, old, old - drift / 2),
            spec=SPECS[name],
            bias=leaves[2],
            temperature=temperature if name == "ppo" else None,
            chunk_rows=4,
            impl=impl,
        )
        out.loss.backward()
        results.append((out.loss.detach(), out.logp, out.entropy, *(x.grad for x in leaves)))
    for got, twin in zip(*results, strict=True):
        bound = 2.0**-8 if got.dtype is torch.bfloat16 else 2e-5
        torch.testing.assert_close(got, twin, rtol=bound, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_ratios_are_exactly_one(make_problem, dtype):
    plan, _, temperature = _batch()
    p = make_problem(13, BLOCK + 9, 16, dtype)
    call = {"temperature": temperature, "chunk_rows": 4, "impl": "triton"}
    old = selected_logprob(p.hidden, p.weight, p.targets, plan, softcap=9.0, **call)
    hidden = p.hidden.clone().requires_grad_()
    for entropy in (False, True):
        spec = LossSpec(softcap=9.0, entropy=entropy)
        out = fused_linear_grpo(hidden, p.weight, p.targets, plan, old, spec=spec, **call)
        assert torch.equal(out.logp, old)
        assert out.metrics.wait()["episode/ratio"] == 1.0


# V: one entry; below, at, and past one block by an odd amount; two blocks and odd.
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.6)])
def test_log_probs_agree_with_float64(make_problem, vocab, bias, temperature):
    p = make_problem(5, vocab, 16, torch.bfloat16, bias=bias, temperature=temperature)
    got = selected_logprob(
        *(p.hidden, p.weight, p.targets),
        temperature=temperature,
        bias=p.bias,
        chunk_rows=3,
        impl="triton",
    )
    error = float((got.double() - p.truth()).abs().max())
    assert error <= 2 * p.torch_error() + 1e-6
