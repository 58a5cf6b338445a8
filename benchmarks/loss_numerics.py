r"""How far the loss is from float64, and what is bitwise equal: the figures of docs/numerics.md.

On the CPU, with operands as they are stored (bfloat16, float16, float32) and logits like a language
model's (``loss_problem``). The row "as on a GPU" is the same code with the two roundings that only
the GPU's path has: weights and scaled states in bfloat16. "A head in common": its rows share a
component ten times as long as the rest of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from command_line import OneLineParser, count
from loss_problem import Problem, Shape, make_problem
from loss_truth import Kind, loss_of, truth_of
from report import print_table

from thor_fast.kernels import Plan, fused_linear_grpo, hierarchical_grpo_head

_KIND = Kind.GRPO


class Result(NamedTuple):
    """Of the rows that are read: log-probs [N]; gradients [T, H] and [V, H]."""

    logp: torch.Tensor
    by_hidden: torch.Tensor
    by_weight: torch.Tensor


def fused(problem: Problem, chunk_rows: int | None = None) -> Result:
    """Ours, on the path that this machine has."""
    hidden, weight = (t.detach().requires_grad_() for t in (problem.hidden, problem.weight))
    found = fused_linear_grpo(
        *(hidden, weight, problem.targets, problem.plan, problem.old_logp), chunk_rows=chunk_rows
    )
    by_hidden, by_weight = torch.autograd.grad(found.loss, [hidden, weight])
    return Result(found.logp[problem.rows], by_hidden, by_weight)


def as_on_a_gpu(problem: Problem) -> Result:
    """Ours, where the GEMMs read weights E in bfloat16, and states times the row's factor."""
    with patch.object(hierarchical_grpo_head, "weights_dtype", lambda _: torch.bfloat16):
        return fused(problem)


def in_common(problem: Problem) -> Problem:
    """The same with a head whose rows share a direction."""
    weight = problem.weight.detach().float()
    shared = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight = weight + 10 * weight.norm(dim=1).mean() * shared / shared.norm()
    return replace(problem, weight=weight.to(problem.weight.dtype).requires_grad_())


def plain(problem: Problem, rounded: bool) -> Result:
    """Whole logits and autograd; ``rounded``: logits in the operands' dtype, as trainers have."""
    hidden, weight = (t.detach().requires_grad_() for t in (problem.hidden, problem.weight))
    wide = torch.float32 if not rounded else hidden.dtype
    logits = (hidden[problem.rows].to(wide) @ weight.to(wide).t()).float()
    targets = problem.targets[problem.rows].unsqueeze(1)
    logp = logits.log_softmax(1).gather(1, targets).squeeze(1)
    by_hidden, by_weight = torch.autograd.grad(loss_of(_KIND, logp, problem), [hidden, weight])
    return Result(logp.detach(), by_hidden, by_weight)


def rounded_gradients(problem: Problem) -> Result:
    """Float32 logits, their gradient in bfloat16 for the GEMMs: the usual way to be careful."""
    x, w = problem.hidden.detach()[problem.rows].float(), problem.weight.detach().float()
    targets = problem.targets[problem.rows].unsqueeze(1)
    scores = (x @ w.t()).log_softmax(1)
    logp = scores.gather(1, targets).squeeze(1).requires_grad_()
    (by_logp,) = torch.autograd.grad(loss_of(_KIND, logp, problem), logp)
    gradient = -scores.exp()
    gradient.scatter_add_(1, targets, torch.ones_like(targets, dtype=w.dtype))
    gradient = (gradient * by_logp.unsqueeze(1)).bfloat16().float()
    by_hidden = torch.zeros_like(problem.hidden)
    by_hidden[problem.rows] = (gradient @ w).to(by_hidden.dtype)
    return Result(logp.detach(), by_hidden, (gradient.t() @ x).to(problem.weight.dtype))


def true_logp(problem: Problem) -> torch.Tensor:
    """[N] float64."""
    logits = problem.hidden.detach()[problem.rows].double() @ problem.weight.detach().double().t()
    return logits.log_softmax(1).gather(1, problem.targets[problem.rows].unsqueeze(1)).squeeze(1)


def errors(shape: Shape) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every way at every dtype."""
    header = ["operands", "way", "logp, most", "logp, mean", "logp > 0", "dX", "dW"]
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = as_dtype(make_problem(shape, torch.device("cpu")), dtype)
        truth, exact = truth_of(_KIND, problem), true_logp(problem)
        ways: dict[str, Callable[[Problem], Result]] = {"ours": fused}
        if dtype is torch.bfloat16:
            ways["ours, as on a GPU"] = as_on_a_gpu
            ways["plain, float32 logits, gradient rounded"] = rounded_gradients
        ways["plain, float32 logits"] = lambda p: plain(p, rounded=False)
        if dtype is not torch.float32:
            ways["plain, rounded logits"] = lambda p: plain(p, rounded=True)
        for name, way in ways.items():
            found = way(problem)
            off = (found.logp.double() - exact).abs()
            row = [str(dtype).removeprefix("torch."), name, f"{off.max():.1e}", f"{off.mean():.1e}"]
            row.append(str(int((found.logp > 0).sum())))
            row += [relative(found.by_hidden, truth.by_hidden)]
            rows.append([*row, relative(found.by_weight, truth.by_weight)])
    return header, [*rows, *_in_common(shape)]


def _in_common(shape: Shape) -> list[list[str]]:
    problem = in_common(as_dtype(make_problem(shape, torch.device("cpu")), torch.bfloat16))
    truth, rows = truth_of(_KIND, problem), []
    ways = {"ours, as on a GPU": as_on_a_gpu, "plain, gradient rounded": rounded_gradients}
    for name, way in ways.items():
        found = way(problem)
        row = ["bfloat16", f"{name}, a head in common", *["-"] * 3]
        row += [relative(found.by_hidden, truth.by_hidden)]
        rows.append([*row, relative(found.by_weight, truth.by_weight)])
    return rows


def as_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """With operands rounded to it; log-probs of the old policy stay."""
    hidden, weight = (
        t.detach().to(dtype).requires_grad_() for t in (problem.hidden, problem.weight)
    )
    return replace(problem, hidden=hidden, weight=weight)


def relative(found: torch.Tensor, truth: torch.Tensor) -> str:
    """Norm of the difference over the truth's."""
    return f"{float((found.double() - truth.double()).norm() / truth.double().norm()):.1e}"


def equalities(shape: Shape) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what two calls that should agree differ by."""
    problem = make_problem(shape, torch.device("cpu"))
    base, again = fused(problem), fused(problem)
    small = fused(problem, chunk_rows=16)
    everything = replace(problem, plan=replace(problem.plan, drop_zero_adv=False))
    silent = replace(problem, plan=silenced(problem, drop=True))
    kept = replace(problem, plan=silenced(problem, drop=False))
    pairs = {
        "the same call twice": (base, again),
        "chunks of 16 rows and one chunk": (small, base),
        "drop_zero_adv, nothing to drop": (fused(everything), base),
    }
    rows = [
        [name, *(most(x, y) for x, y in zip(a, b, strict=True))] for name, (a, b) in pairs.items()
    ]
    gone, there = fused(silent), fused(kept)
    differences = [most(x, y) for x, y in zip(gone[1:], there[1:], strict=True)]
    rows.append(["half of the advantages 0: rows dropped and kept", "-", *differences])
    return ["two calls", "logp", "dX", "dW"], rows


def silenced(problem: Problem, *, drop: bool) -> Plan:
    """The plan with every second row's advantage 0."""
    trainable = problem.plan.trainable
    even = (torch.arange(len(trainable.rows)) % 2).float()
    quiet = trainable._replace(
        advantage=trainable.advantage * even, nll_weight=trainable.nll_weight * even
    )
    return replace(problem.plan, trainable=quiet, drop_zero_adv=drop, selections={})


def most(a: torch.Tensor, b: torch.Tensor) -> str:
    """The largest difference, relative to the largest value."""
    if torch.equal(a, b):
        return "bitwise equal"
    return f"{float((a - b).abs().max() / b.abs().max()):.1e}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors are one line on stderr and exit status 2."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="loss_numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("tokens", 512), ("hidden", 256), ("vocab", 32_003)):
        parser.add_argument(f"--{name}", type=count, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 on bad options."""
    args = parse(argv)
    shape = Shape(args.tokens, args.hidden, args.vocab, "episodes")
    print(f"{shape.key}: distance from float64\n")
    print_table(*errors(shape))
    print("\nlargest difference of two calls, float32\n")
    print_table(*equalities(shape))
    return 0


if __name__ == "__main__":
    sys.exit(main())
