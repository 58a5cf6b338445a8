"""The error bound: no gradient further from float64 than plain torch's in the same dtype.

Plain torch at its most careful: float32 logits and softmax, whose gradient is rounded to bfloat16
for the GEMMs. The GPU's path rounds too, and is run here as it is, but on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from thor_fast.kernels import (
    KL,
    LossSpec,
    Plan,
    fused_linear_grpo,
    hierarchical_grpo_head,
    linear_grpo_reference,
    logits_grpo,
    logits_grpo_reference,
    make_plan,
)

T, V, H = 192, 2003, 64
SPECS = {
    "thor": LossSpec(),
    "gspo": LossSpec(kind="gspo", nll_alpha=0.0),
    "sapo, KL": LossSpec(kind="sapo", kl=KL(beta=0.1)),
    "entropy's gradient": LossSpec(entropy_coef=0.05),
}


@dataclass(frozen=True)
class Problem:
    """bfloat16 states and head; targets sampled from the logits that they have."""

    hidden: torch.Tensor  # [T, H]
    weight: torch.Tensor  # [V, H]
    targets: torch.Tensor  # [T]
    old_logp: torch.Tensor  # [T] float64
    plan: Plan

    @property
    def rows(self) -> tuple[torch.Tensor, Plan, torch.Tensor, torch.Tensor]:
        return self.targets, self.plan, self.old_logp, self.old_logp


def make_problem(seed: int, common: float) -> Problem:
    """States that point at one token; ``common``: what all rows of the head share, in norms."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randn(V, H, generator=gen) / H**0.5
    shared = torch.randn(H, generator=gen)
    strength = 4 + 8 * torch.rand(T, 1, generator=gen)
    hidden = torch.randn(T, H, generator=gen)
    hidden += strength * tokens[torch.randint(0, V, (T,), generator=gen)]
    weight = (tokens + common * shared / shared.norm()).bfloat16()
    hidden = hidden.bfloat16()
    scores = (hidden.double() @ weight.double().t()).log_softmax(1)
    targets = torch.multinomial(scores.exp(), 1, generator=gen)
    logp = scores.gather(1, targets).squeeze(1)
    plan = make_plan(
        torch.rand(T, generator=gen) < 0.6,
        torch.arange(8) % 2,
        advantages=torch.randn(8, generator=gen),
        cu_seqlens=torch.arange(0, T + 1, T // 8),
    )
    old = logp + 0.05 * torch.randn(T, generator=gen, dtype=torch.float64)
    return Problem(hidden, weight, targets.squeeze(1), old, plan)


def truth_of(problem: Problem, spec: LossSpec) -> list[torch.Tensor]:
    leaves = [t.double().requires_grad_() for t in (problem.hidden, problem.weight)]
    return list(
        torch.autograd.grad(linear_grpo_reference(*leaves, *problem.rows, spec=spec), leaves)
    )


def careful_torch(problem: Problem, spec: LossSpec) -> list[torch.Tensor]:
    hidden, weight = problem.hidden.float(), problem.weight.float()
    logits = (hidden @ weight.t()).requires_grad_()
    loss = logits_grpo_reference(logits, *problem.rows, spec=spec)
    (gradient,) = torch.autograd.grad(loss, logits)
    gradient = gradient.bfloat16().float()
    return [(gradient @ weight).bfloat16(), (gradient.t() @ hidden).bfloat16()]


def ours(problem: Problem, spec: LossSpec) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (problem.hidden, problem.weight)]
    return list(
        torch.autograd.grad(fused_linear_grpo(*leaves, *problem.rows, spec=spec).loss, leaves)
    )


def errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """Norm of the difference over the truth's."""
    return [
        float((one.double() - exact).norm() / exact.norm())
        for one, exact in zip(found, truth, strict=True)
    ]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that GEMMs read are bfloat16, as they are on CUDA; all else follows from that."""
    monkeypatch.setattr(hierarchical_grpo_head, "weights_dtype", lambda _: torch.bfloat16)


@pytest.mark.parametrize("name", SPECS)
# A head whose rows share nothing; and one where a row that does not sum to 0 costs dX its digits.
@pytest.mark.parametrize("common", [0.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("on_a_gpu")
def test_rounded_weights_are_no_worse_than_plain_torch(name, common, seed):
    problem, spec = make_problem(seed, common), SPECS[name]
    truth = truth_of(problem, spec)
    plain = errors(careful_torch(problem, spec), truth)
    for error, allowed in zip(errors(ours(problem, spec), truth), plain, strict=True):
        assert error <= allowed


@pytest.mark.usefixtures("on_a_gpu")
def test_what_all_rows_of_a_head_share_does_not_leak_into_the_states_gradient():
    spec = LossSpec()
    alike, apart = (make_problem(0, common) for common in (10.0, 0.0))
    error, _ = errors(ours(alike, spec), truth_of(alike, spec))
    usual, _ = errors(ours(apart, spec), truth_of(apart, spec))
    assert error <= 1.3 * usual
    careful, _ = errors(careful_torch(alike, spec), truth_of(alike, spec))
    assert careful > 2 * error


@pytest.mark.parametrize("name", SPECS)
def test_the_path_on_a_cpu_is_no_worse_than_plain_torch(name):
    problem, spec = make_problem(3, 10.0), SPECS[name]
    truth = truth_of(problem, spec)
    plain = errors(careful_torch(problem, spec), truth)
    for error, allowed in zip(errors(ours(problem, spec), truth), plain, strict=True):
        assert error <= allowed


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_the_caller_holds_are_no_worse_than_plain_torch(name, dtype):
    problem, spec = make_problem(4, 0.0), SPECS[name]
    logits = (problem.hidden.float() @ problem.weight.float().t()).to(dtype)
    exact, plain, leaf = (
        logits.to(d, copy=True).requires_grad_() for d in (torch.float64, torch.float32, dtype)
    )
    (truth,) = torch.autograd.grad(
        1024 * logits_grpo_reference(exact, *problem.rows, spec=spec), exact
    )
    (careful,) = torch.autograd.grad(
        1024 * logits_grpo_reference(plain, *problem.rows, spec=spec), plain
    )
    (got,) = torch.autograd.grad(1024 * logits_grpo(leaf, *problem.rows, spec=spec).loss, leaf)
    # The one rounding of both is the result's own: equal but for what float32 leaves open.
    (error,), (allowed,) = (errors([one], [truth]) for one in (got, careful.to(dtype)))
    assert error <= 1.01 * allowed
