"""From measurements to the record and the tables: medians over rounds, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loss_measure import Measurement
from loss_peers.registry import FROZEN, OURS
from loss_problem import Problem
from loss_truth import Kind

__all__ = ["Outcome", "Run", "details_table", "record", "summary_table"]


@dataclass(slots=True)
class Outcome:
    """Of one backend on one problem. ``problem`` says why it was not timed, if it was not."""

    kind: Kind
    errors: dict[str, float]
    problem: str
    rounds: list[Measurement] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """One problem: what it was, the floors and the backends in every round."""

    data: Mapping[str, float]
    rows: int
    hidden: int
    vocab: int
    floors: dict[int, list[Measurement]]
    outcomes: dict[str, Outcome]
    absent: dict[str, str]

    @classmethod
    def of(cls, problem: Problem, outcomes: dict[str, Outcome], absent: dict[str, str]) -> Run:
        """Before the first round."""
        shape = problem.shape
        floors: dict[int, list[Measurement]] = {2: [], 3: []}
        rows = len(problem.rows)
        return cls(problem.data, rows, shape.hidden, shape.vocab, floors, outcomes, absent)


def record(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Everything that was measured, by problem, for the JSON line."""
    return {key: _record(run) for key, run in runs.items()}


def _record(run: Run) -> dict[str, Any]:
    flop = 2.0 * run.rows * run.hidden * run.vocab
    floors = {}
    for count, rounds in run.floors.items():
        seconds = _median([m.seconds for m in rounds])
        floors[str(count)] = {"seconds": seconds, "flop_per_s": count * flop / seconds}
    return {
        "data": dict(run.data),
        "active_rows": run.rows,
        "floors": floors,
        "backends": {name: _summary(run, name) for name in run.outcomes},
        "absent": run.absent,
    }


def _summary(run: Run, name: str) -> dict[str, Any]:
    outcome = run.outcomes[name]
    found: dict[str, Any] = {
        "loss": outcome.kind.name.lower(),
        "errors": outcome.errors,
        "problem": outcome.problem,
    }
    if not outcome.rounds:
        return found
    seconds = [m.seconds for m in outcome.rounds]
    floor = [m.seconds for m in run.floors[2 if name == FROZEN else 3]]
    ours = [m.seconds for m in run.outcomes[OURS].rounds]
    memory = [m.extra_bytes for m in outcome.rounds if m.extra_bytes is not None]
    return found | {
        "seconds": _median(seconds),
        "seconds_by_round": seconds,
        "share_of_floor": _median([f / s for f, s in zip(floor, seconds, strict=True)]),
        "times_ours": _median([s / o for s, o in zip(seconds, ours, strict=True)])
        if ours
        else None,
        "extra_bytes": max(memory) if memory else None,
    }


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def details_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per problem and backend."""
    header = ["problem", "backend", "loss", "ms", "x ours", "of floor", "extra GB"]
    header += ["loss err", "dX err", "dW err"]
    rows = []
    for key, run in metrics.items():
        for count, floor in run["floors"].items():
            rate = f"{floor['flop_per_s'] / 1e12:.1f} TFLOP/s"
            row = [key, f"floor: {count} GEMMs", rate, f"{1e3 * floor['seconds']:.2f}"]
            rows.append([*row, *[""] * 6])
        for name, m in run["backends"].items():
            errors = [_scientific(m["errors"].get(e)) for e in ("loss", "by_hidden", "by_weight")]
            if m["problem"]:
                rows.append([key, name, m["problem"], *[""] * 4, *errors])
                continue
            row = [key, name, m["loss"], f"{1e3 * m['seconds']:.2f}", _times(m["times_ours"])]
            memory = "-" if m["extra_bytes"] is None else f"{m['extra_bytes'] / 1e9:.2f}"
            rows.append([*row, f"{100 * m['share_of_floor']:.0f} %", memory, *errors])
        rows += [[key, name, why, *[""] * 7] for name, why in run["absent"].items()]
    return header, rows


def summary_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per problem, one column per backend, in times of ours."""
    names = list(dict.fromkeys(name for run in metrics.values() for name in run["backends"]))
    header = ["problem", "active", "floor ms", *names]
    rows = []
    for key, run in metrics.items():
        row = [key, f"{100 * run['data']['active_share']:.0f} %"]
        row.append(f"{1e3 * run['floors']['3']['seconds']:.2f}")
        rows.append([*row, *(_cell(name, run["backends"].get(name)) for name in names)])
    return header, rows


def _cell(name: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "-"
    if summary["problem"]:
        return summary["problem"].partition(":")[0]
    if name in (OURS, FROZEN):
        return f"{1e3 * summary['seconds']:.2f} ms, {100 * summary['share_of_floor']:.0f} %"
    # Another loss is not ours computed faster or slower.
    other = "" if summary["loss"] == Kind.GRPO.name.lower() else "*"
    return _times(summary["times_ours"]) + other


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
