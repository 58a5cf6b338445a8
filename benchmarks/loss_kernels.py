r"""The fused hierarchical GRPO loss against other ways to compute it: time and peak memory.

Forward and backward from hidden states and head to their gradients. Loss and gradients of every
backend are held against float64 first; one that is off is not timed. Then every backend runs in
every round, in turns, after the floors: the 2 or 3 GEMMs of the rows that are read, which no exact
gradient can do without (2: below a frozen head). Ratios are taken within a round; medians over the
rounds are reported. A star marks another loss than ours (plain cross-entropy, PPO's clip alone).

``--logits`` measures the case of callers that hold logits instead: ours reads them twice and writes
the gradient once, and the floor is a copy of them.

Logits are made to be like a language model's, targets are sampled from them; the record says how
sharp they came out. On a CPU everything is tiny: that checks this program and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from command_line import OneLineParser, count, exit_status
from gpu_state import gpu_state
from loss_given import given_table, run_given
from loss_measure import check, floors, measure
from loss_peers.registry import FROZEN, GIVEN, NAMES, OURS, Backend, describe, open_backends
from loss_plot import plot
from loss_problem import SCENARIOS, Problem, Shape, make_problem
from loss_results import Outcome, Run, details_table, record, summary_table
from loss_truth import Kind, truth_of
from report import append_record, print_table

RESULTS = Path(__file__).parent / "results" / "loss_kernels.jsonl"
# By device: tokens, hidden, vocabulary. Those of --quick come first.
_SIZES = {
    "cuda": ((8192, 32768, 131072), (2048, 3584, 4096), 151936),
    "cpu": ((64, 256), (32, 64), 509),
}


def run_one(shape: Shape, names: Sequence[str], rounds: int, device: torch.device) -> Run:
    """Make the problem, check every backend, then measure all in every round."""
    problem = make_problem(shape, device)
    backends, absent = open_backends(names, problem)
    outcomes = check_all(backends, problem)
    run = Run.of(problem, outcomes, absent)
    ready = [b for b in backends if not outcomes[b.name].problem]
    for name, outcome in outcomes.items():
        if outcome.problem:
            print(f"{shape.key}, {name}: {outcome.problem}", flush=True)
    least = floors(problem)
    for run_floor in least.values():
        run_floor()  # cuBLAS chooses and loads its kernels at their first use
    for number in range(rounds):
        for gemms, run_floor in least.items():
            run.floors[gemms].append(run_floor())
        # The order turns with the round: nobody always comes after the heaviest.
        turn = number % max(1, len(ready))
        for backend in (*ready[turn:], *ready[:turn]):
            outcomes[backend.name].rounds.append(measure(backend, problem))
    print(f"{shape.key}: {len(ready)} of {len(names)} backends, {rounds} rounds", flush=True)
    return run


def check_all(backends: Sequence[Backend], problem: Problem) -> dict[str, Outcome]:
    """Each loss's truth is made once, and is gone before anything is timed."""
    outcomes: dict[str, Outcome] = {}
    for kind in Kind:
        mine = [backend for backend in backends if backend.kind is kind]
        if mine:
            truth = truth_of(kind, problem)
            for backend in mine:
                errors, wrong = check(backend, problem, truth)
                outcomes[backend.name] = Outcome(kind, errors, wrong)
                _empty_cache(problem.hidden.device)
    return {backend.name: outcomes[backend.name] for backend in backends}


def _empty_cache(device: torch.device) -> None:
    # What one backend's blocks left behind must not be why the next runs out of memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors are one line on stderr and exit status 2."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="loss_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=count, action="append", help="T, a multiple of 32; may be repeated")
    add("--hidden", type=count, action="append", help="H, may be repeated")
    add("--vocab", type=count, help="V")
    add("--scenario", choices=SCENARIOS, action="append", help="may be repeated; default: all")
    add("--backend", choices=NAMES, action="append", help="may be repeated; default: all")
    add("--logits", action="store_true", help="losses of given logits, not of a head")
    add("--rounds", type=count, default=5, help="default: 5")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    add("--quick", action="store_true", help="one round of the smallest problems: does it work")
    add("--output", type=Path, default=RESULTS, help="JSON lines; the plot lies next to it")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda', but torch sees no GPU")
    for tokens in args.tokens or ():
        if tokens % 32:  # sequences of one length, at least two of at least 16 tokens
            parser.error(f"argument --tokens: '{tokens}', expected a multiple of 32")
    if args.vocab is not None and args.vocab < 2:
        parser.error(f"argument --vocab: '{args.vocab}', expected at least 2")
    return args


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """All combinations of what was asked for, defaults in the place of the rest."""
    tokens, hidden, vocab = _SIZES[args.device]
    if args.logits:  # of one head, whichever: larger ones of them would not fit a GPU
        tokens, hidden = tokens[:2], hidden[:1]
    if args.quick:
        tokens, hidden = tokens[:1], hidden[:1]
    sizes = product(args.scenario or SCENARIOS, args.hidden or hidden, args.tokens or tokens)
    return [Shape(t, h, args.vocab or vocab, scenario) for scenario, h, t in sizes]


def run(args: argparse.Namespace) -> int:
    """Everything the command line asks for; 1 if ours was wrong anywhere."""
    known = tuple(GIVEN) if args.logits else NAMES
    names = [n for n in known if args.backend is None or n in (*args.backend, OURS)]
    device = torch.device(args.device)
    rounds = 1 if args.quick else args.rounds
    before = gpu_state()
    announce(device, before, {name: describe(name, logits=args.logits) for name in names})
    if args.logits:
        metrics = {f"logits {s.key}": run_given(s, names, rounds, device) for s in shapes_of(args)}
    else:
        metrics = record({s.key: run_one(s, names, rounds, device) for s in shapes_of(args)})
    params = {
        "device": args.device,
        "rounds": rounds,
        "quick": args.quick,
        "cuda": torch.version.cuda,
        "gpu_before": before,
        "gpu_after": gpu_state(),
        "absent": {name: why for one in metrics.values() for name, why in one["absent"].items()},
    }
    append_record(args.output, "loss_kernels", params, metrics)
    title = f"torch {torch.__version__}, {before['name'] if before else 'CPU: no figures to quote'}"
    floor = "a copy's rate" if args.logits else "the GEMMs' rate"
    print(plot(args.output.with_suffix(".png"), metrics, title, floor) + "\n")
    show(metrics, args.logits)
    ours = [one["backends"][n] for one in metrics.values() for n in (OURS, FROZEN) if n in names]
    return int(any(summary["problem"] for summary in ours))


def show(metrics: Mapping[str, Any], logits: bool) -> None:
    """The tables, the one that matters most last."""
    if logits:
        print_table(*given_table(metrics))
        return
    print_table(*details_table(metrics))
    print(f"\nOurs in ms and share of the floor; others in times of {OURS}, * is another loss:\n")
    print_table(*summary_table(metrics))


def announce(device: torch.device, gpu: dict[str, str] | None, backends: Mapping[str, str]) -> None:
    """Say what will run on what, before it does."""
    print(f"torch {torch.__version__} on {device}; GPU: {gpu}")
    if device.type == "cpu":
        print("on a CPU this checks the program; its times are no figures to quote")
    for name, description in backends.items():
        print(f"{name}: {description}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where ours is wrong, 2 on bad options, 130 if interrupted."""
    args = parse(argv)
    return exit_status("loss_kernels", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
