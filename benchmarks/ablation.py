"""THOR's ablation (arXiv 2509.13761, table 3) in small: what each part adds, on two CPU cores.

| | policy | asked |
|---|---|---|
| T1 | as it was taught | for an answer at once |
| T2 | T1 + RL on episodes | for an answer at once |
| T3 | as it was taught (the cold start) | for Python |
| T4 | T3 + RL on episodes | for Python |
| T5 | T3 + RL on episodes and on failed steps | for Python |
| T6 | T5, failed calls rolled back at inference | for Python |

Tasks and policy are ``thor_fast.synthetic``'s; sampling, code, sandbox, grading and training are
real. T1 and T3 are one model, taught both ways of answering; it is far too small to compute in its
head, so T1 and T2 say nothing about large models. Each seed is another order of tasks and another
noise; tasks of RL, of the cold start and of the tests are drawn apart. Examined at temperature 1.

Policies are trained in processes of their own, ``--jobs`` at a time, each with one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ablation_plot import plot
from ablation_run import Order, Preset
from ablation_table import arms_of, print_results
from command_line import OneLineParser, count, exit_status
from report import append_record

from thor_fast.errors import ThorError

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
PRESETS = {
    "full": Preset(
        steps=40,
        train_prompts=32,
        group_size=8,
        step_group_size=8,
        lr=3e-4,
        test_tasks=60,
        test_samples=4,
    ),
    "smoke": Preset(
        steps=2,
        train_prompts=4,
        group_size=4,
        step_group_size=4,
        lr=3e-4,
        test_tasks=2,
        test_samples=2,
    ),
}
# What is trained, by name: the arms are read off these.
POLICIES: Mapping[str, dict[str, Any]] = {
    "direct": {"tool": False, "train": "none"},
    "direct, episodes": {"tool": False, "train": "episode"},
    "tool": {"tool": True, "train": "none"},
    "tool, episodes": {"tool": True, "train": "episode"},
    "tool, both levels": {"tool": True, "train": "both"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return exit_status("ablation", lambda: run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = OneLineParser(
        prog="ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="full", help="smoke: seconds, means nothing")
    add("--seeds", type=count, help="default: 3, of smoke 1")
    add("--steps", type=count, help="RL steps; default: the preset's")
    add("--jobs", type=count, default=len(os.sched_getaffinity(0)), help="processes at a time")
    add("--output", type=Path, default=RESULTS, help="JSON lines; a plot goes beside them")
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = 3 if args.preset == "full" else 1
    return args


def run(args: argparse.Namespace) -> int:
    """Everything the command line asks for; returns 0, raises ``ThorError``."""
    preset = PRESETS[args.preset]
    if args.steps is not None:
        preset = dataclasses.replace(preset, steps=args.steps)
    started = time.perf_counter()
    print(
        f"{len(POLICIES)} policies, {args.seeds} seeds, {preset.steps} steps of "
        f"{preset.train_prompts} x {preset.group_size} episodes; {args.jobs} at a time",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="thor-ablation-") as folder:
        found = _carried_out(preset, args.seeds, args.jobs, Path(folder))
    wall_s = time.perf_counter() - started
    params = {"preset": args.preset, "seeds": args.seeds, "jobs": args.jobs}
    params |= dataclasses.asdict(preset)
    metrics = {"wall_s": wall_s, "policies": found, "arms": arms_of(found)}
    append_record(args.output, "ablation", params, metrics)
    curves = {n: [r["curve"] for r in runs] for n, runs in found.items() if runs[0]["curve"]}
    title = f"Tiny policy, {args.seeds} seeds: each thin, their mean thick"
    print(plot(args.output.with_suffix(".png"), curves, title))
    print(f"{wall_s / 60:.1f} minutes, record: {args.output}\n")
    print_results(found)
    return 0


def _carried_out(
    preset: Preset, seeds: int, jobs: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """By policy, the result of each seed. The long ones first, so that no core idles at the end."""
    names = sorted(POLICIES, key=lambda n: ("none", "episode", "both").index(POLICIES[n]["train"]))
    orders = [(n, s) for s in range(seeds) for n in reversed(names)]
    found: dict[str, list[Any]] = {name: [None] * seeds for name in POLICIES}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(_in_a_process, name, seed, preset, folder): (name, seed)
            for name, seed in orders
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name, seed = futures[future]
                found[name][seed] = result = future.result()
                accuracy = result["scores"]["plain, trained"]["accuracy"]
                print(f"{done}/{len(orders)}  {name}, seed {seed}: {accuracy:.1%}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _in_a_process(name: str, seed: int, preset: Preset, folder: Path) -> dict[str, Any]:
    place = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    place.mkdir()
    order = dataclasses.asdict(Order(seed=seed, preset=preset, **POLICIES[name]))
    (place / "ORDER.json").write_text(json.dumps(order), encoding="utf-8")
    command = [sys.executable, Path(__file__).with_name("ablation_run.py"), place / "ORDER.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (place / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        lines = (place / "log").read_text("utf-8", errors="replace").strip().splitlines()
        raise ThorError(f"{name}, seed {seed}: {lines[-1] if lines else 'ended without a word'}")
    result: dict[str, Any] = json.loads((place / "RESULT.json").read_text("utf-8"))
    return result


if __name__ == "__main__":
    sys.exit(main())
