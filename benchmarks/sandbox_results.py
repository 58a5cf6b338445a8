"""From measurements to the record and the tables: medians over rounds, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandbox_accounting import Process
from sandbox_load import Measurement
from sandbox_peers.registry import BASELINE
from sandbox_workloads import Verdict, Workload

__all__ = ["Results", "details_table", "goals_table", "idle_memory", "record"]

# By workload key, by backend: one measurement per round.
Results = Mapping[str, Mapping[str, Sequence[Measurement]]]

# The workload that tail latency and CPU per execution are read from; the issue names it.
_TAIL = "trivial c=8"
_TAIL_GOAL = 4.0


def ratios(runs: Mapping[str, Sequence[Measurement]], name: str) -> list[float]:
    """Executions per second relative to the plain subprocess, round by round."""
    pairs = zip(runs[name], runs[BASELINE], strict=True)
    return [ours.rate / plain.rate for ours, plain in pairs]


def record(results: Results) -> dict[str, dict[str, Any]]:
    """Everything that was measured, by workload and backend, for the JSON line."""
    return {key: {name: _summary(runs, name) for name in runs} for key, runs in results.items()}


def _summary(runs: Mapping[str, Sequence[Measurement]], name: str) -> dict[str, Any]:
    rounds = runs[name]

    def median(value: Callable[[Measurement], float]) -> float:
        return statistics.median(value(run) for run in rounds)

    return {
        "ratio": statistics.median(ratios(runs, name)),
        "executions_per_s": median(lambda r: r.rate),
        "p50_s": median(lambda r: r.quantile_s(0.5)),
        "p99_s": median(lambda r: r.quantile_s(0.99)),
        "p99_over_p50": median(_tail),
        "cpu_s_per_execution": median(lambda r: r.cpu_s / r.executions),
        "caller_cpu_s_per_execution": median(lambda r: r.caller_cpu_s / r.executions),
        "executions": sum(run.executions for run in rounds),
        **{
            verdict.name.lower(): sum(run.verdicts.get(verdict, 0) for run in rounds)
            for verdict in Verdict
        },
        "first_wrong": next((run.example for run in rounds if run.example), ""),
        "ratio_by_round": ratios(runs, name),
    }


def _tail(run: Measurement) -> float:
    return run.quantile_s(0.99) / run.quantile_s(0.5)


def idle_memory(processes: Sequence[Process], slots: int) -> dict[str, Any]:
    """What a backend's processes hold while nothing runs; ``None`` where it cannot be read."""
    sizes = [process.pss_bytes for process in processes]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return {
        "slots": slots,
        "pss_bytes": total,
        "pss_bytes_per_slot": None if total is None else total / slots,
        "processes": [{"name": p.name, "pss_bytes": p.pss_bytes} for p in processes],
    }


def details_table(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per workload and backend."""
    header = ["workload", "backend", "n", "exec/s", "ratio", "p50 ms", "p99 ms"]
    header += ["CPU ms", "caller ms", "false timeouts", "no limit", "wrong"]
    rows = []
    for key, backends in metrics.items():
        for name, m in backends.items():
            row = [key, name, str(m["executions"]), f"{m['executions_per_s']:.1f}"]
            row += [f"{m['ratio']:.2f}", f"{1e3 * m['p50_s']:.2f}", f"{1e3 * m['p99_s']:.2f}"]
            row += [_cpu_ms(name, m, f"{f}_per_execution") for f in ("cpu_s", "caller_cpu_s")]
            rows.append([*row, *(str(m[v]) for v in ("false_timeout", "unbounded", "wrong"))])
    return header, rows


def goals_table(
    workloads: Sequence[Workload],
    metrics: Mapping[str, Mapping[str, Any]],
    memory: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per goal, one column per backend."""
    names = list(next(iter(metrics.values())))
    header = ["", "goal", *names]
    rows = []
    for workload in workloads:
        cells = metrics[workload.key]
        goal = f">= {workload.goal:g} x" if workload.goal else "stated"
        rows.append([workload.key, goal, *(_speed(name, cells[name]) for name in names)])
    if _TAIL in metrics:
        cells = metrics[_TAIL]
        tails = (f"{cells[name]['p99_over_p50']:.1f}" for name in names)
        rows.append([f"p99 / p50, {_TAIL}", f"<= {_TAIL_GOAL:g}", *tails])
        for field, label in (("cpu_s", "CPU ms"), ("caller_cpu_s", "  of it in the caller")):
            spent = (_cpu_ms(name, cells[name], f"{field}_per_execution") for name in names)
            rows.append([f"{label}, {_TAIL}", "stated", *spent])
    for verdict, label in (
        ("false_timeout", "false timeouts"),
        ("unbounded", "limit not enforced"),
        ("wrong", "wrong results"),
    ):
        totals = [sum(backends[name][verdict] for backends in metrics.values()) for name in names]
        rows.append([label, "0", *map(str, totals)])
    rows.append(["idle memory per slot, MB", "stated", *(_megabytes(memory.get(n)) for n in names)])
    return header, rows


def _speed(name: str, summary: Mapping[str, Any]) -> str:
    if summary["wrong"]:
        return f"{summary['wrong']} wrong"  # who fails fast is not fast
    if name == BASELINE:
        return f"{summary['executions_per_s']:.1f}/s"
    return f"{summary['ratio']:.1f} x"


def _cpu_ms(name: str, summary: Mapping[str, Any], field: str) -> str:
    if name == "fusion" and field == "cpu_s_per_execution":
        return "unknown"  # what a server elsewhere uses is not ours to see
    return f"{1e3 * summary[field]:.2f}"


def _megabytes(memory: Mapping[str, Any] | None) -> str:
    if memory is None:
        return "-"
    per_slot = memory["pss_bytes_per_slot"]
    return "unknown" if per_slot is None else f"{per_slot / 1e6:.1f}"
