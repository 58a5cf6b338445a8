"""The ablation's rows: THOR's arms read off the policies, means over seeds, and their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from report import print_table

__all__ = ["arms_of", "print_results"]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
# Arm: policy, how it is examined.
_ARMS = {
    "T1 no tool": ("direct", "plain"),
    "T2 + episode RL": ("direct, episodes", "plain"),
    "T3 tool, cold start": ("tool", "plain"),
    "T4 + episode RL": ("tool, episodes", "plain"),
    "T5 + step RL": ("tool, both levels", "plain"),
    "T6 + self-correction": ("tool, both levels", "corrected"),
    "T3 corrected": ("tool", "corrected"),
    "T4 corrected": ("tool, episodes", "corrected"),
}
_DIFFERENCES = (
    ("T3 - T1", "T3 tool, cold start", "T1 no tool"),
    ("T4 - T3", "T4 + episode RL", "T3 tool, cold start"),
    ("T5 - T4", "T5 + step RL", "T4 + episode RL"),
    ("T6 - T5", "T6 + self-correction", "T5 + step RL"),
)
# Of Student's t at 97.5 %, by degrees of freedom; more seeds than that count as ten.
_T = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def arms_of(found: Runs) -> dict[str, dict[str, list[float | None]]]:
    """By arm and number, the value of each seed."""
    arms = {}
    for arm, (policy, way) in _ARMS.items():
        numbers: dict[str, list[float | None]] = {}
        for where in ("trained", "held out"):
            scores = [run["scores"][f"{way}, {where}"] for run in found[policy]]
            numbers |= {
                f"accuracy, {where}": [s["accuracy"] for s in scores],
                f"call success, {where}": [s["call_success"] for s in scores],
                f"tokens an episode, {where}": [
                    s["sampled_tokens"] / s["episodes"] for s in scores
                ],
            }
        arms[arm] = numbers
    return arms


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t over the seeds)."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), math.inf
    t = _T[min(n, len(_T)) - 1]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def print_results(found: Runs) -> None:
    """Arms, then what each part adds seed by seed, then how soon a level is reached."""
    arms = arms_of(found)
    columns = ("accuracy, trained", "call success, trained", "accuracy, held out")
    last = "tokens an episode, trained"
    header = ["mean over seeds, +- 95 %", *columns, last]
    rows = [
        [arm, *(_percent(numbers[c]) for c in columns), _plain(numbers[last])]
        for arm, numbers in arms.items()
    ]
    print_table(header, rows)
    print()
    rows = []
    for name, more, less in _DIFFERENCES:
        cells = [
            [
                None if a is None or b is None else a - b
                for a, b in zip(arms[more][c], arms[less][c], strict=True)
            ]
            for c in columns
        ]
        rows.append([name, *map(_percent, cells)])
    print_table(["differences, seed by seed", *columns], rows)
    print()
    print(_reached(found["tool, episodes"], found["tool, both levels"]))


def _percent(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "no calls"
    mean, half = interval(known)
    return f"{mean:.1%}" if math.isinf(half) else f"{mean:.1%} +- {half:.1%}"


def _plain(values: Sequence[float | None]) -> str:
    return f"{statistics.mean(v for v in values if v is not None):.0f}"


def _reached(episodes: Sequence[Mapping[str, Any]], both: Sequence[Mapping[str, Any]]) -> str:
    """Where each curve is first as high as the mean of T4's last five points, seed by seed.

    T4's own first time is told, too: a curve that goes up and down is there before its end.
    """
    lines = ["first as high as the mean of T4's last five points, after:"]
    for seed, (one, two) in enumerate(zip(episodes, both, strict=True)):
        for number in ("accuracy", "call_success"):
            level = statistics.mean(p[number] for p in one["curve"][-5:])
            found = {"T4": _first(one["curve"], number, level)}
            found["T5"] = _first(two["curve"], number, level)
            told = "; ".join(f"{name} {when}" for name, when in found.items())
            lines.append(f"  seed {seed}, {number} {level:.1%}: {told}")
    return "\n".join(lines)


def _first(curve: Sequence[Mapping[str, Any]], number: str, level: float) -> str:
    point = next((p for p in _smooth(curve, number) if p[number] >= level), None)
    if point is None:
        return "not at all"
    return f"{point['step']} updates, {point['rollout_tokens']:,} tokens"


def _smooth(curve: Sequence[Mapping[str, Any]], number: str) -> list[dict[str, Any]]:
    """The mean of each point and the two before it."""
    return [
        {**curve[i], number: statistics.mean(p[number] for p in curve[max(0, i - 2) : i + 1])}
        for i in range(len(curve))
    ]
