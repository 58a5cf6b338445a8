r"""The main job: tokens per second of our rollouts, and of others, in one run.

All modes roll out the same prompts, in groups of ``--group-size`` samples as GRPO takes them, with
the same seeds on the same engine, in turns:

- ``barrier``: THOR's way, loop and tools: rounds, text in between, eight snippets at a time, each
  sent by HTTP to a server that starts an interpreter for it, see ``fusion_server.py``;
- ``barrier-loop``: the same loop with the sandbox of the modes below;
- ``resubmit``: tokens in, tokens out, on an engine with a prefix cache, see ``resubmit_engine.py``;
- ``ours``: ``thor_fast.rollout.RolloutScheduler``, where equal pure snippets of a group run once;
- ``free``: ours, with tools that cost nothing: recorded results, replayed at once.

``--tools`` says what snippets do besides their own text, in all modes: ``plain`` nothing; ``sympy``
import it, as models do above their mathematics; ``mixed`` one in eight does; ``slow`` wait for
0.25 s or so, on no CPU, as one does that asks another service. See ``rollout_tools.py``.
``--kv-tokens`` makes the KV pool small: take a third of what ``ours`` holds at the most without it.

By default a tiny policy solves arithmetic by writing Python, on the CPU. ``--engine scripted``
replays worked solutions instead, 5 ms per token whatever the load: a rollout without a model, and
without ``resubmit``, for want of a cache.
``barrier`` and ``--sandbox fresh`` are UNSAFE for any model but the tiny policy: with
``--model`` they run only if they are named.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from command_line import OneLineParser, count, exit_status
from report import append_record, print_table, progress
from rollout_modes import MODES, Result, Rollouts
from rollout_setup import Setup, build
from rollout_tools import TOOLS

from thor_fast.errors import ConfigError
from thor_fast.synthetic import TEST_SEED, TRAINED_FAMILIES, Task, task_set

RESULTS = Path(__file__).parent / "results" / "rollout_throughput.jsonl"


async def measure(
    setup: Setup, tasks: Sequence[Task], modes: Sequence[str], repeats: int
) -> dict[str, list[Result]]:
    """Each mode ``repeats`` times, in turns, the order swapped each time; one short run before."""
    rollouts = Rollouts(setup)
    results: dict[str, list[Result]] = {mode: [] for mode in modes}
    try:
        for mode in modes:
            await rollouts.run(mode, tasks[:2], lambda done, total: None)
        if "free" in modes:  # what it replays
            await rollouts.run("ours", tasks, lambda done, total: None)
        for repeat in range(repeats):
            for mode in modes if repeat % 2 == 0 else reversed(modes):
                with progress(f"{mode:12} {repeat + 1}/{repeats}") as update:
                    results[mode].append(await rollouts.run(mode, tasks, update))
    finally:
        await setup.engine.aclose()
    return results


def table(results: dict[str, list[Result]]) -> list[list[str]]:
    """One row per metric, one column per mode: medians over the repeats."""

    def row(name: str, form: str, value: Callable[[Result], float | None]) -> list[str]:
        cells = [name]
        for runs in results.values():
            values = [known for run in runs if (known := value(run)) is not None]
            cells.append(
                format(statistics.median(values), form) if len(values) == len(runs) else "unknown"
            )
        return cells

    rows = [
        row("wall time, s", ".2f", lambda r: r.wall_s),
        row("tokens/s, sampled", ".0f", lambda r: r.sampled_tokens / r.wall_s),
        row("episodes/s", ".2f", lambda r: r.episodes / r.wall_s),
        row("accuracy", ".3f", lambda r: r.correct / r.episodes),
        row("tool calls that ran", ".0f", lambda r: r.tool_calls),
        row("tool time, s, added up", ".3f", lambda r: r.tool_s),
        row("  hidden, of wall time", ".1%", lambda r: r.tools_hidden_s / r.wall_s),
        row("  exposed, of wall time", ".1%", lambda r: r.tools_exposed_s / r.wall_s),
        row("engine calls per episode", ".2f", lambda r: r.engine_calls / r.episodes),
        row(
            "prefill tokens per call",
            ".1f",
            lambda r: None if r.prefill_tokens is None else r.prefill_tokens / r.engine_calls,
        ),
        row("  new text + 1 token", ".1f", lambda r: r.least_prefill_tokens / r.engine_calls),
        row("calls whose KV was gone", ".0f", lambda r: r.calls_evicted),
        row("evictions and preemptions", ".0f", lambda r: r.evictions),
        row("most KV tokens held at once", ".0f", lambda r: r.most_live_tokens),
        row(
            "tokens changed by re-tokenising", ".3%", lambda r: r.changed_tokens / r.sampled_tokens
        ),
    ]
    if len(results) > 1:
        for base in results:
            ratios = [f"{ratio(results, mode, base):.2f} x" for mode in results]
            rows.append([f"tokens/s, of {base}", *ratios])
    return rows


def ratio(results: dict[str, list[Result]], mode: str, base: str) -> float:
    """A mode's tokens/s over another's, repeat by repeat; the median."""
    pairs = zip(results[mode], results[base], strict=True)
    return statistics.median(
        (a.sampled_tokens / a.wall_s) / (b.sampled_tokens / b.wall_s) for a, b in pairs
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; errors are one line on stderr and exit status 2."""
    assert __doc__ is not None
    parser = OneLineParser(
        prog="rollout_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", choices=("paged", "vllm", "scripted"), default="paged")
    add("--model", type=Path, help="folder of a Hugging Face model; default: the tiny policy")
    add("--sandbox", choices=("native", "fresh"), default="native", help="but for barrier")
    add("--tools", choices=TOOLS, default="mixed", help="what snippets do; default: mixed")
    add("--family", choices=TRAINED_FAMILIES, action="append", help="of tasks; default: all")
    add("--mode", choices=MODES, action="append", help="may be repeated; default: all that fit")
    add("--episodes", type=count, default=256, help="in all, of a run; default: 256")
    add("--group-size", type=count, default=8, help="of them with each task; default: 8")
    add("--repeats", type=count, default=3, help="runs of each mode; default: 3")
    add("--seed", type=int, default=0, help="of the sampling noise; default: 0")
    add("--max-sequences", type=count, default=64, help="live at a time; default: 64")
    add("--max-context", type=count, default=512, help="tokens per sequence; default: 512")
    add("--kv-tokens", type=count, help="the KV pool; default: room for every live sequence")
    add("--output", type=Path, default=RESULTS, help="JSON lines; default: benchmarks/results/")
    return parser.parse_args(argv)


def _modes(args: argparse.Namespace) -> tuple[str, ...]:
    """Those asked for, or all that are safe and that the engine can do."""
    if args.mode is not None:
        if "resubmit" in args.mode and args.engine == "scripted":
            raise ConfigError("--mode resubmit: the scripted engine has no prefix cache")
        return tuple(mode for mode in MODES if mode in args.mode)
    left_out = {"resubmit"} if args.engine == "scripted" else set()
    if args.model is not None:
        left_out.add("barrier")
    return tuple(mode for mode in MODES if mode not in left_out)


def run(args: argparse.Namespace) -> int:
    """Everything the command line asks for; returns 0, raises ``ThorError``."""
    modes = _modes(args)
    n_tasks, odd = divmod(args.episodes, args.group_size)
    if odd:
        raise ConfigError(
            f"--episodes is {args.episodes}, expected a multiple of --group-size {args.group_size}"
        )
    tasks = task_set(n_tasks, TEST_SEED, args.family or TRAINED_FAMILIES)
    print(
        f"{args.episodes} episodes of {n_tasks} tasks, {args.engine} engine, {args.sandbox} "
        f"sandbox, {args.tools} tools, at most {args.max_sequences} live; {', '.join(modes)}; "
        f"{args.repeats} times",
        flush=True,
    )
    setup = build(args, tasks)
    with setup.sandbox:
        results = asyncio.run(measure(setup, tasks, modes, args.repeats))
    params = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    del params["output"]
    metrics = {mode: [asdict(run) for run in runs] for mode, runs in results.items()}
    append_record(args.output, "rollout_throughput", params, metrics)
    print(
        "\nTool time counts from handing a snippet to the sandbox to its result. Hidden: some "
        "snippet is there\nwhile some sequence decodes. Exposed: some snippet is there and nothing "
        f"decodes. Medians of {args.repeats}.\n"
    )
    print_table(["", *results], table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what cannot work, 130 when interrupted."""
    args = parse(argv)
    return exit_status("rollout_throughput", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
