"""The loss on a GPU, where it is meant to run: what no interpreter can show.

Legend: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from thor_fast.kernels import (
    KL,
    LossSpec,
    Plan,
    fused_linear_grpo,
    linear_grpo_reference,
    logits_grpo,
    make_plan,
)
from thor_fast.rl import HierarchicalGRPOLoss, TrainingBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Two shapes: one that blocks divide, one where nothing divides anything. Both hold two chunks.
SHAPES = [(384, 4096, 64), (301, 5003, 72)]
CHUNK_ROWS = 128
SPECS = {
    "thor": LossSpec(),
    "kl and entropy": LossSpec(kl=KL(beta=0.1), entropy_coef=0.01),
    "entropy for metrics": LossSpec(entropy=True, temperature=0.7),
    "cispo": LossSpec(kind="cispo", clip_high=0.4),
    "gspo": LossSpec(kind="gspo"),
    "geo_mean": LossSpec(kind="geo_mean"),
    "sapo": LossSpec(kind="sapo"),
    "softcap and scale": LossSpec(softcap=20.0, logit_scale=0.5),
}
# Of the gradients' norm. float32: sums of V terms. Halves: their operands and outputs are rounded.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}


@dataclass
class Case:
    """On the GPU; ``plan`` on the CPU, as everywhere."""

    hidden: torch.Tensor  # [T, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    targets: torch.Tensor  # [T]
    old_logp: torch.Tensor  # [T] float32
    ref_logp: torch.Tensor  # [T] float32
    plan: Plan

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def fused(self, spec: LossSpec, **settings: Any) -> Any:
        return fused_linear_grpo(
            *(self.hidden, self.weight, self.targets, self.plan, self.old_logp, self.ref_logp),
            spec=spec,
            bias=self.bias,
            chunk_rows=CHUNK_ROWS,
            **settings,
        )

    def truth(self, spec: LossSpec) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients in float64, of the operands as they are stored."""
        copies = [t.detach().double().requires_grad_() for t in self.leaves()]
        loss = linear_grpo_reference(
            *(copies[0], copies[1], self.targets, self.plan),
            *(self.old_logp.double(), self.ref_logp.double()),
            spec=spec,
            bias=copies[2] if self.bias is not None else None,
        )
        return loss.detach(), list(torch.autograd.grad(loss, copies))


def make_case(
    shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool = False, sharp: float = 4.0
) -> Case:
    """Logits of standard deviation ``sharp``; a row in three is not read; two levels."""
    tokens, vocab, width = shape
    gen = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=gen)
    weight = torch.randn(vocab, width, generator=gen) * (sharp / width**0.5)
    mask = torch.rand(tokens, generator=gen) < 0.67
    lengths = torch.full((12,), tokens // 12)
    lengths[-1] += tokens % 12
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    scores = (hidden @ weight.t()).log_softmax(1)
    targets = torch.multinomial(scores.exp(), 1, generator=gen).squeeze(1)
    logp = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    plan = make_plan(
        mask,
        torch.arange(12) % 2,
        advantages=torch.randn(12, generator=gen),
        cu_seqlens=bounds,
    )
    return Case(
        hidden=hidden.to(dtype).cuda().requires_grad_(),
        weight=weight.to(dtype).cuda().requires_grad_(),
        bias=torch.randn(vocab, generator=gen).cuda().requires_grad_() if bias else None,
        targets=targets.cuda(),
        old_logp=(logp + 0.2 * torch.randn(tokens, generator=gen)).cuda(),
        ref_logp=(logp + 0.2 * torch.randn(tokens, generator=gen)).cuda(),
        plan=plan,
    )


def assert_near(found: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
    assert torch.isfinite(found).all()
    distance = (found.double() - truth).norm() / truth.norm().clamp(min=1e-30)
    assert distance <= bound, f"off by {distance:.1e} of the norm, expected at most {bound:.0e}"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_against_float64(name, shape, dtype):
    case, spec = make_case(shape, dtype, bias=name == "thor"), SPECS[name]
    found = case.fused(spec, impl="triton")
    gradients = torch.autograd.grad(found.loss, case.leaves())
    loss, expected = case.truth(spec)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-4, atol=1e-4)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert_near(gradient, truth, BOUND[dtype])


@pytest.mark.parametrize("name", ["thor", "kl and entropy", "softcap and scale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_against_its_twin(name, shape):
    case, spec = make_case(shape, torch.bfloat16), SPECS[name]
    triton, twin = (case.fused(spec, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(triton.logp, twin.logp, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(triton.entropy, twin.entropy, rtol=1e-5, atol=2e-5)
    for a, b in zip(
        torch.autograd.grad(triton.loss, case.leaves()),
        torch.autograd.grad(twin.loss, case.leaves()),
        strict=True,
    ):
        assert_near(a, b.double(), BOUND[torch.bfloat16])
    # Some metrics are counts of clipped rows: a row at the bound may fall on either side.
    one, other = triton.metrics.wait(), twin.metrics.wait()
    assert one.keys() == other.keys()
    for key in ("episode/logp", "step/logp", "episode/ratio", "step/ratio"):
        assert one[key] == pytest.approx(other[key], abs=1e-5)


def test_weights_in_the_place_of_their_logits():
    """bfloat16 weights lie over the float32 logits of their row: a store may overtake no load.

    At three lengths of a row around the block's: a race would show in the last columns first.
    """
    for vocab in (4096, 8192 + 1, 3 * 4096 - 1):
        case = make_case((128, vocab, 64), torch.bfloat16)
        _, expected = case.truth(LossSpec())
        for _ in range(20):
            gradients = torch.autograd.grad(case.fused(LossSpec()).loss, case.leaves())
            for gradient, truth in zip(gradients, expected, strict=True):
                assert_near(gradient, truth, BOUND[torch.bfloat16])


@pytest.mark.parametrize("sharp", [40.0, 120.0])
def test_rows_whose_target_is_unlikely_are_shifted(sharp):
    """Weights far above 2^86 times the target's, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(SHAPES[1], dtype, sharp=sharp)
        case.targets = case.targets.roll(1)  # what another row sampled
        spec = LossSpec(nll_alpha=1.0)
        found = case.fused(spec)
        assert found.logp.min() < -88
        loss, expected = case.truth(spec)
        torch.testing.assert_close(found.loss.double(), loss, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(found.loss, case.leaves())
        for gradient, truth in zip(gradients, expected, strict=True):
            assert_near(gradient, truth, BOUND[dtype])


@pytest.mark.parametrize("name", SPECS)
def test_two_runs_are_equal_bit_by_bit(name):
    case = make_case(SHAPES[1], torch.bfloat16, bias=True)
    runs = []
    for _ in range(3):
        found = case.fused(SPECS[name])
        gradients = torch.autograd.grad(found.loss, case.leaves())
        runs.append([found.loss, found.logp, found.entropy, *gradients])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_frozen_head_gives_the_same_states_gradient():
    case = make_case(SHAPES[0], torch.bfloat16)
    (both, _) = torch.autograd.grad(case.fused(LossSpec()).loss, case.leaves())
    case.weight = case.weight.detach()
    (alone,) = torch.autograd.grad(case.fused(LossSpec()).loss, [case.hidden])
    assert torch.equal(both, alone)


def test_the_host_waits_for_nothing():
    """From the collator's CPU masks to the gradient; waiting is an error in this mode."""
    case = make_case(SHAPES[1], torch.bfloat16)
    case.fused(LossSpec()).loss.backward()  # compiles, and fills the allocators
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = case.fused(LossSpec())
        found.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.metrics.wait()["episode/tokens"] > 0


def test_the_module_waits_for_nothing():
    batch = TrainingBatch(
        token_ids=torch.arange(64) % 50,
        cu_seqlens=torch.tensor([0, 40, 64]),
        loss_mask=(torch.arange(64) % 40 > 9),
        level=torch.tensor([0, 1]),
        advantages=torch.tensor([1.0, -1.0]),
        old_logprobs=torch.full((64,), -4.0),
    )
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.nn.Linear(32, 50, bias=False, device="cuda", dtype=torch.bfloat16)
    loss = HierarchicalGRPOLoss()
    loss(hidden, head, batch).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss(hidden, head, batch)
        found.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.metrics.wait()["step/tokens"] > 0


@pytest.mark.parametrize("op", ["logits", "head"])
@pytest.mark.parametrize("name", ["thor", "gspo", "kl and entropy"])
def test_captured_in_a_cuda_graph(op, name):
    """Forward and backward; a plan's rows are part of what is captured, metrics are of a replay."""
    case, spec = make_case(SHAPES[0], torch.bfloat16), SPECS[name]
    logits = (case.hidden @ case.weight.t()).detach().float().requires_grad_()
    changed = logits if op == "logits" else case.hidden
    rows = (case.targets, case.plan, case.old_logp, case.ref_logp)

    def step() -> tuple[Any, torch.Tensor]:
        found = logits_grpo(logits, *rows, spec=spec) if op == "logits" else case.fused(spec)
        (gradient,) = torch.autograd.grad(found.loss, [changed])
        return found, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradient = step()
    with torch.no_grad():
        changed.mul_(1.1)
    graph.replay()
    torch.cuda.synchronize()
    again, expected = step()
    assert torch.equal(captured.loss, again.loss)
    assert torch.equal(gradient, expected)
    assert captured.metrics.wait() == again.metrics.wait()


def test_rows_beyond_two_to_the_31():
    """Offsets are 64 bits wide: [T, V] passes 2^31 in one chunk."""
    free, _ = torch.cuda.mem_get_info()
    if free < 45 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, expected 45")
    tokens, vocab, width = 14_400, 151_936, 64
    gen = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, generator=gen, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, generator=gen, device="cuda", dtype=torch.bfloat16) / 4
    targets = torch.randint(0, vocab, (tokens,), generator=gen, device="cuda")
    plan = make_plan(
        torch.ones(tokens, dtype=torch.bool),
        0,
        advantages=torch.ones(1),
        cu_seqlens=torch.tensor([0, tokens]),
    )
    old = torch.full((tokens,), -20.0, device="cuda")
    spec = LossSpec(nll_alpha=1.0, clip_high=1e9)
    results = []
    for chunk_rows in (tokens, 1000):
        states = hidden.clone().requires_grad_()
        found = fused_linear_grpo(
            *(states, weight, targets, plan, old), spec=spec, chunk_rows=chunk_rows
        )
        found.loss.backward()
        results.append((found.logp, states.grad))
    (logp, gradient), (same_logp, same_gradient) = results
    torch.testing.assert_close(logp, same_logp, rtol=1e-5, atol=1e-5)
    assert_near(gradient[-100:], same_gradient[-100:].double(), 1e-2)


def test_extra_memory_is_that_of_a_chunk():
    """What is allocated beyond gradients and a chunk's logits does not grow with T * V."""
    tokens, vocab, width = 8192, 32_768, 256
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    plan = make_plan(
        torch.ones(tokens, dtype=torch.bool),
        0,
        advantages=torch.ones(1),
        cu_seqlens=torch.tensor([0, tokens]),
    )
    old = torch.zeros(tokens, device="cuda")
    rows = 512

    def step() -> None:
        fused_linear_grpo(hidden, weight, targets, plan, old, chunk_rows=rows).loss.backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    logits, states, head = 4 * rows * vocab, 2 * tokens * width, 2 * vocab * width
    # Copies of the states' rows and their gradients; the head's gradient in float32 and twice in
    # bfloat16 (kept and scaled); a chunk's logits, and room for one more of its kind.
    assert extra < 2 * logits + 6 * states + 5 * head + 2**24
