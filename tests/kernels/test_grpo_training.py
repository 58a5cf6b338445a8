"""What a training step does with the loss: accumulate, freeze, compile, run twice, save work."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from thor_fast.kernels import (
    KL,
    Counts,
    LossSpec,
    fused_linear_grpo,
    linear_grpo_reference,
    logits_grpo,
    make_plan,
    register_loss,
)
from thor_fast.kernels.hierarchical_grpo import _fused_linear_grpo_op
from thor_fast.kernels.hierarchical_grpo_logits import _logits_grpo_op
from thor_fast.kernels.hierarchical_grpo_plan import AGGREGATIONS
from thor_fast.kernels.hierarchical_grpo_spec import BUILT_IN_LOSSES


def loss_of(batch, plan=None, hidden=None, weight=None, bias=None, **settings):
    return fused_linear_grpo(
        batch.hidden if hidden is None else hidden,
        batch.weight if weight is None else weight,
        batch.targets,
        batch.plan() if plan is None else plan,
        *batch.rows,
        bias=bias,
        **settings,
    ).loss


def gemms(run):
    """The shapes of their operands, one entry for each that was run."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    names = ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return [event.input_shapes for event in recorded.events() if event.name in names]


@pytest.mark.parametrize("kind", BUILT_IN_LOSSES)
@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_accumulated_micro_batches_are_the_single_batch(make_grpo_batch, kind, agg):
    batch = make_grpo_batch(seed=31)
    spec = LossSpec(kind=kind, kl=KL(beta=0.1))
    norm = 50 if agg in ("dr_grpo", "seq-mean-token-sum-norm") else None
    common = {"agg": agg, "norm_tokens": norm}
    whole = loss_of(batch, batch.plan(**common), spec=spec)
    expected = torch.autograd.grad(whole, batch.leaves[:2])
    for cuts in ((0, 1, 6), (0, 3, 4, 6), tuple(range(7))):
        pieces = list(pairwise(cuts))

        def piece(first, last, normalizer):
            tokens = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
            plan = make_plan(
                batch.mask[tokens],
                torch.repeat_interleave(batch.level, batch.cu_seqlens.diff())[tokens],
                advantages=torch.repeat_interleave(batch.advantages, batch.cu_seqlens.diff())[
                    tokens
                ],
                cu_seqlens=batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first],
                normalizer=normalizer,
                **common,
            )
            return tokens, plan

        counts = [piece(*ends, "global")[1].counts for ends in pieces]
        total = sum(counts[1:], start=counts[0])
        for leaf in batch.leaves:
            leaf.grad = None
        losses = 0.0
        for ends in pieces:
            tokens, plan = piece(*ends, total)
            rows = (batch.targets, batch.old_logp, batch.ref_logp)
            targets, old, ref = (values[tokens] for values in rows)
            out = fused_linear_grpo(
                batch.hidden[tokens], batch.weight, targets, plan, old, ref, spec=spec
            )
            out.loss.backward()
            losses += out.loss.item()
        assert losses == pytest.approx(whole.item(), rel=1e-12)
        got = (batch.hidden.grad, batch.weight.grad)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


def test_thor_scales_a_micro_batch_by_its_share_of_sequences(make_grpo_batch):
    batch = make_grpo_batch(seed=33)
    alone = loss_of(batch, batch.plan(normalizer="thor"))
    share = loss_of(batch, batch.plan(normalizer="thor", mini_batch_sequences=24))
    assert share.item() == pytest.approx(alone.item() * 6 / 24, rel=1e-6)
    counts = batch.plan().counts
    both = Counts(*((sum(pair), sum(pair)) for pair in counts))
    by_counts = loss_of(batch, batch.plan(normalizer=both))
    assert alone.item() == pytest.approx(by_counts.item(), rel=1e-12)


def test_backward_twice_and_twice_in_a_sum(make_grpo_batch):
    batch = make_grpo_batch(seed=35)
    once = torch.autograd.grad(loss_of(batch, bias=batch.bias), batch.leaves)
    loss = loss_of(batch, bias=batch.bias)
    loss.backward(retain_graph=True)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(batch.leaves, once, strict=True))
    loss.backward()
    for leaf, grad in zip(batch.leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)
    loss = loss_of(batch, bias=batch.bias)
    for got, grad in zip(torch.autograd.grad(loss + 2 * loss, batch.leaves), once, strict=True):
        torch.testing.assert_close(got, 3 * grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["head", "logits"])
def test_a_factor_on_the_loss_costs_no_digits(make_grpo_batch, dtype, op):
    """A third is not a bfloat16; and unscaled, these gradients are too small for float16."""
    batch = make_grpo_batch(seed=36).to(dtype)
    plan = batch.plan(level_weight=(1e-7, 1e-7))

    def gradients(leaves, factor):
        called = fused_linear_grpo if op == "head" else logits_grpo
        out = called(*leaves, batch.targets, plan, *batch.rows)
        return torch.autograd.grad(factor * out.loss, leaves)

    leaves = batch.leaves[:2]
    if op == "logits":
        leaves = ((batch.hidden @ batch.weight.t()).detach().requires_grad_(),)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for factor in (2.0**20 / 3, 2.0**22):
        for got, want in zip(gradients(leaves, factor), gradients(exact, factor), strict=True):
            assert got.dtype is dtype
            # bfloat16 is rounded before the factor as well; and float32's errors before that.
            near = torch.finfo(dtype).eps * want.abs() + 1e-5 * want.abs().max()
            assert ((got.double() - want).abs() <= near).all()
            assert (got.double() * want.sign()).sum().item() == pytest.approx(
                want.abs().sum().item(), rel=1e-3
            )


def test_the_embedding_may_be_the_head(make_grpo_batch):
    batch = make_grpo_batch(seed=37)
    tied = batch.weight.detach().clone().requires_grad_()
    words = torch.randint(0, len(tied), batch.targets.shape)
    plan = batch.plan()

    def gradient(op):
        hidden = torch.tanh(torch.nn.functional.embedding(words, tied))
        loss = op(hidden, tied, batch.targets, plan, *batch.rows)
        return torch.autograd.grad(getattr(loss, "loss", loss), tied)[0]

    expected = gradient(linear_grpo_reference)
    torch.testing.assert_close(gradient(fused_linear_grpo), expected, rtol=1e-9, atol=1e-14)


def test_lora_on_the_head(make_grpo_batch):
    batch = make_grpo_batch(seed=39)
    gen = torch.Generator().manual_seed(1)
    down = torch.randn(2, 16, generator=gen, dtype=torch.float64).requires_grad_()
    up = torch.randn(53, 2, generator=gen, dtype=torch.float64).requires_grad_()
    frozen = batch.weight.detach()
    results = []
    for op in (fused_linear_grpo, linear_grpo_reference):
        loss = op(batch.hidden, frozen + 0.5 * up @ down, batch.targets, batch.plan(), *batch.rows)
        results.append(torch.autograd.grad(getattr(loss, "loss", loss), (batch.hidden, up, down)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "hidden", "weight", "expected"),
    [
        ("ppo", True, True, 3),
        ("ppo", True, False, 2),  # below a frozen head
        ("ppo", False, True, 2),
        ("ppo", False, False, 1),
        # A sequence's ratio is known after the logits only: of one chunk they are kept.
        ("gspo", True, True, 3),
        ("gspo", True, False, 2),
        ("gspo", False, False, 1),
        ("entropy", True, True, 3),
        ("entropy", False, False, 1),
    ],
)
def test_gemms_are_run_for_what_is_wanted_only_and_over_rows_that_count_only(
    make_grpo_batch, kind, hidden, weight, expected
):
    batch = make_grpo_batch(seed=41)
    spec = LossSpec(entropy_coef=0.1) if kind == "entropy" else LossSpec(kind=kind)
    plan = batch.plan()
    rows = len(plan.select(spec).rows)
    assert 0 < rows < len(batch.targets)
    batch.hidden.requires_grad_(hidden)
    batch.weight.requires_grad_(weight)
    shapes = gemms(lambda: loss_of(batch, plan, spec=spec))
    assert len(shapes) == expected
    for shape in shapes:
        sizes = {size for operand in shape for size in operand}
        assert rows in sizes
        assert len(batch.targets) not in sizes
    chunks = gemms(lambda: loss_of(batch, plan, spec=spec, chunk_rows=rows // 2 + 1))
    again = 2 if kind == "gspo" and hidden else 0  # a second chunk takes the first one's place
    assert len(chunks) == 2 * expected + again


def test_without_gradient_mode_nothing_but_logits_is_computed(make_grpo_batch):
    batch = make_grpo_batch(seed=43)
    with torch.no_grad():
        loss = loss_of(batch)
        assert len(gemms(lambda: loss_of(batch))) == 1
    assert not loss.requires_grad
    assert torch.equal(loss, loss_of(batch).detach())


def test_only_the_loss_has_a_gradient(make_grpo_batch):
    batch = make_grpo_batch(seed=43)
    out = fused_linear_grpo(batch.hidden, batch.weight, batch.targets, batch.plan(), *batch.rows)
    assert out.loss.requires_grad
    assert not out.logp.requires_grad
    assert not out.entropy.requires_grad


@pytest.mark.parametrize("kind", BUILT_IN_LOSSES)
def test_two_runs_are_bitwise_equal(make_grpo_batch, kind):
    batch = make_grpo_batch(vocab=2053, hidden=64, longest=40, seed=45).to(torch.float32)
    spec = LossSpec(kind=kind, kl=KL(beta=0.1), entropy=True)
    plan = batch.plan()
    runs = []
    for _ in range(2):
        loss = loss_of(batch, plan, bias=batch.bias, spec=spec, chunk_rows=7)
        runs.append((loss, *torch.autograd.grad(loss, batch.leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_strided_inputs_read_as_their_contiguous_copies(make_grpo_batch):
    batch = make_grpo_batch(seed=47)

    def strided(values):
        wide = torch.full((*values.shape, 2), 9, dtype=values.dtype)
        wide[..., 0] = values.detach()
        return wide[..., 0]

    hidden, weight = (strided(leaf.t()).t().requires_grad_() for leaf in batch.leaves[:2])
    bias = strided(batch.bias).requires_grad_()
    targets, old = strided(batch.targets), strided(batch.old_logp)
    assert not any(x.is_contiguous() for x in (hidden, weight, bias, targets, old))
    loss = fused_linear_grpo(hidden, weight, targets, batch.plan(), old, bias=bias).loss
    plain = loss_of(batch, bias=batch.bias)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    expected = torch.autograd.grad(plain, batch.leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    logits = (batch.hidden @ batch.weight.t()).detach()
    results = []
    for given in (strided(logits.t()).t(), logits):
        given.requires_grad_()
        out = logits_grpo(given, batch.targets, batch.plan(), *batch.rows)
        results.append(torch.autograd.grad(out.loss, given)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_autocast_does_not_lower_the_precision_of_logits(make_grpo_batch):
    batch = make_grpo_batch(seed=49).to(torch.float32)
    expected = loss_of(batch, bias=batch.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(batch, bias=batch.bias), expected)
        logits = batch.hidden.double() @ batch.weight.double().t()
        given = logits_grpo(logits, batch.targets, batch.plan(), *batch.rows)
    assert given.loss.dtype is torch.float64


@pytest.fixture(scope="module")
def own_loss():
    def on_steps(logp, old_logp, advantage, level):
        return -advantage * logp * level, -advantage * level

    register_loss("on steps", on_steps, zero_without_advantage=True)
    return "on steps"


@pytest.mark.parametrize("kind", ["ppo", "gspo", "own"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_as_one_graph_for_plan_after_plan(make_grpo_batch, own_loss, kind, backend):
    kind = own_loss if kind == "own" else kind
    spec = LossSpec(kind=kind, kl=KL(beta=0.1), entropy=True)

    def step(hidden, weight, targets, plan, old, ref):
        return fused_linear_grpo(torch.tanh(hidden), weight, targets, plan, old, ref, spec=spec)

    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    backend = counting if backend == "eager" else backend
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    compiled_for = []
    for seed in range(51, 57):
        batch = make_grpo_batch(seed=seed).to(torch.float32)
        args = (batch.hidden, batch.weight, batch.targets, batch.plan(), *batch.rows)
        results = []
        for call in (compiled, step):
            out = call(*args)
            results.append((out.loss, *torch.autograd.grad(out.loss, batch.leaves[:2])))
            metrics = out.metrics.wait()
            assert metrics["step/tokens"] + metrics["episode/tokens"] == int(batch.mask.sum())
        torch.testing.assert_close(*results)
        compiled_for.append(len(graphs))
    assert compiled_for[-1] == compiled_for[2]  # sizes that have changed once may be any


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("spec", [LossSpec(kl=KL()), LossSpec(kind="gspo", entropy=True)])
def test_the_custom_ops_keep_their_contracts(make_grpo_batch, wanted, spec):
    batch = make_grpo_batch(vocab=7, hidden=3, longest=4, seed=55).to(torch.float32)
    selection = list(batch.plan().select(spec))
    rows = (selection, *batch.rows, batch.temperature, spec.text)
    for leaf, want in zip(batch.leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    args = (*batch.leaves, batch.targets, *rows, "", 3, False, *wanted)
    assert set(torch.library.opcheck(_fused_linear_grpo_op, args).values()) == {"SUCCESS"}
    logits = (batch.hidden @ batch.weight.t()).detach().requires_grad_(wanted[0])
    args = (logits, batch.targets, *rows, False, wanted[0])
    assert set(torch.library.opcheck(_logits_grpo_op, args).values()) == {"SUCCESS"}
