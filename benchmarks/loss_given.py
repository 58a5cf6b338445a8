"""The loss of logits that the caller holds: time, memory, and the share of the traffic's floor.

The floor is a copy of the logits: as many bytes read as they have, and as many written, 4 T V in
bfloat16. No gradient of all rows can do with less; where rows are not read, theirs are zeros, and
more than the copy's rate is possible. Ours moves as much, if the cache keeps the rows under way;
the factor on the loss is 1 here, another would cost 4 T V more.

Legend: T tokens, B sequences of L tokens, V vocabulary, N rows that are read.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from loss_measure import TOLERANCE, Measurement, timed
from loss_peers.registry import GIVEN, OURS
from loss_peers.unsupported import Unsupported
from loss_problem import Problem, Shape, make_problem
from loss_truth import Kind, loss_of
from report import first_line

from thor_fast.kernels import make_plan

__all__ = ["Given", "given_table", "make_given", "run_given"]

_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Given:
    """A problem's logits, in place of its head."""

    problem: Problem
    logits: torch.Tensor  # [T, V], a leaf with gradient


def make_given(shape: Shape, device: torch.device) -> Given:
    """The last row of each sequence is not read: Liger's layout has none that predicts there."""
    problem = make_problem(shape, device)
    length = shape.tokens // problem.sequences
    last = torch.arange(shape.tokens, device=device) % length == length - 1
    targets = problem.targets.masked_fill(last, -100)
    mask = targets >= 0
    sequence = torch.arange(shape.tokens, device=device)[mask] // length
    plan = make_plan(
        mask.cpu(),
        0,
        advantages=problem.advantages.cpu(),
        cu_seqlens=torch.arange(0, shape.tokens + 1, length),
    )
    problem = replace(
        problem,
        targets=targets,
        rows=mask.nonzero().squeeze(1),
        by_row=problem.advantages[sequence],
        plan=plan,
    )
    logits = (problem.hidden @ problem.weight.t()).detach()
    return Given(problem, logits.requires_grad_())


def run_given(
    shape: Shape, names: Sequence[str], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Check every backend, then measure all in every round; the record of one problem."""
    given = make_given(shape, device)
    backends, record = _open(names, given)
    for name, (kind, run) in list(backends.items()):
        error, wrong = _check(kind, run, given)
        record["backends"][name] = {"loss": kind.name.lower(), "errors": error, "problem": wrong}
        if wrong:
            print(f"logits {shape.key}, {name}: {wrong}", flush=True)
            del backends[name]
    floor: list[Measurement] = []
    found: dict[str, list[Measurement]] = {name: [] for name in backends}
    copy = torch.empty_like(given.logits)
    for _ in range(rounds):
        floor.append(timed(lambda: copy.copy_(given.logits.detach()), device))
        for name, (_, run) in backends.items():
            found[name].append(timed(lambda run=run: _step(run, given), device))
    seconds = statistics.median(m.seconds for m in floor)
    moved = 2 * copy.numel() * copy.element_size()
    record["floors"]["copy"] = {"seconds": seconds, "bytes_per_s": moved / seconds}
    for name, measured in found.items():
        record["backends"][name] |= _summary(measured, floor, found.get(OURS))
    return record


def _open(
    names: Sequence[str], given: Given
) -> tuple[dict[str, tuple[Kind, Callable[[], torch.Tensor]]], dict[str, Any]]:
    """What can run, and the record to fill, which says why the others cannot."""
    opened: dict[str, tuple[Kind, Callable[[], torch.Tensor]]] = {}
    absent: dict[str, str] = {}
    for name in names:
        module = importlib.import_module(f"loss_peers.{GIVEN[name]}")
        try:
            opened[name] = (module.KIND, module.make(given))
        except ImportError as error:
            absent[name] = f"not installed ({error.name or first_line(error)})"
        except Unsupported as error:
            absent[name] = str(error)
    rows = len(given.problem.rows)
    data = given.problem.data | {"active_share": rows / len(given.logits)}
    record = {"data": data, "active_rows": rows, "floors": {}, "backends": {}, "absent": absent}
    return opened, record


def _step(run: Callable[[], torch.Tensor], given: Given) -> None:
    run().backward()
    given.logits.grad = None


def _check(
    kind: Kind, run: Callable[[], torch.Tensor], given: Given
) -> tuple[dict[str, float], str]:
    """Loss and gradient against float64, and what is wrong with them, or nothing."""
    try:
        loss = run()
        loss.backward()
        errors = _errors(kind, float(loss.detach()), given)
    except torch.OutOfMemoryError:
        return {}, "out of memory"
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        return {}, f"failed: {type(error).__name__}: {first_line(error)[:200]}"
    finally:
        given.logits.grad = None
    bound = TOLERANCE[given.logits.dtype]
    worst = max(errors, key=lambda name: errors[name])
    # A comparison that NaN passes would be none.
    if not errors[worst] <= bound or any(e != e for e in errors.values()):
        return errors, f"wrong: {worst} is off by {errors[worst]:.1e}, expected at most {bound:g}"
    return errors, ""


def _errors(kind: Kind, loss: float, given: Given) -> dict[str, float]:
    """In chunks of float64, once for the log-probs and once for the gradient."""
    problem, logits, gradient = given.problem, given.logits.detach(), given.logits.grad
    assert gradient is not None
    targets = problem.targets[problem.rows].unsqueeze(1)
    size = max(1, _CHUNK_BYTES // (8 * logits.shape[1]))
    parts = [slice(at, at + size) for at in range(0, len(problem.rows), size)]

    def scores(part: slice) -> torch.Tensor:
        return logits[problem.rows[part]].double().log_softmax(1)

    logp = torch.cat([scores(p).gather(1, targets[p]).squeeze(1) for p in parts]).requires_grad_()
    truth = loss_of(kind, logp, problem)
    (by_logp,) = torch.autograd.grad(truth, logp)
    off = size_of_it = 0.0
    for part in parts:
        exact = -scores(part).exp()
        exact.scatter_add_(1, targets[part], torch.ones_like(targets[part], dtype=exact.dtype))
        exact *= by_logp[part].unsqueeze(1)
        off += float((gradient[problem.rows[part]].double() - exact).square().sum())
        size_of_it += float(exact.square().sum())
    silent = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    silent[problem.rows] = False
    off += float(gradient[silent].float().square().sum())
    by_logits = (off / max(size_of_it, 1e-60)) ** 0.5
    expected = float(truth.detach())
    return {"loss": abs(loss - expected) / max(1.0, abs(expected)), "by_logits": by_logits}


def _summary(
    measured: Sequence[Measurement],
    floor: Sequence[Measurement],
    ours: Sequence[Measurement] | None,
) -> dict[str, Any]:
    def ratio(over: Sequence[Measurement], under: Sequence[Measurement]) -> float:
        return statistics.median(a.seconds / b.seconds for a, b in zip(over, under, strict=True))

    memory = [m.extra_bytes for m in measured if m.extra_bytes is not None]
    return {
        "seconds": statistics.median(m.seconds for m in measured),
        "seconds_by_round": [m.seconds for m in measured],
        "share_of_floor": ratio(floor, measured),
        "times_ours": ratio(measured, ours) if ours else None,
        "extra_bytes": max(memory) if memory else None,
    }


def given_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one per problem and backend."""
    header = ["problem", "backend", "loss", "ms", "x ours", "of a copy", "extra GB", "dlogits err"]
    rows = []
    for key, run in metrics.items():
        floor = run["floors"]["copy"]
        rate = f"{floor['bytes_per_s'] / 1e12:.2f} TB/s"
        rows.append([key, "floor: a copy", rate, f"{1e3 * floor['seconds']:.2f}", *[""] * 4])
        for name, m in run["backends"].items():
            if m["problem"]:
                rows.append([key, name, m["problem"], *[""] * 5])
                continue
            memory = "-" if m["extra_bytes"] is None else f"{m['extra_bytes'] / 1e9:.2f}"
            times = "-" if m["times_ours"] is None else f"{m['times_ours']:.2f} x"
            row = [key, name, m["loss"], f"{1e3 * m['seconds']:.2f}", times]
            row += [f"{100 * m['share_of_floor']:.0f} %", memory]
            rows.append([*row, f"{m['errors']['by_logits']:.1e}"])
        rows += [[key, name, why, *[""] * 5] for name, why in run["absent"].items()]
    return header, rows
