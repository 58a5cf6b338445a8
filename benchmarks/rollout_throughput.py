r"""The main job: episodes per second with a barrier after each round, and without.

Both modes roll out the same prompts with the same seeds on the same engine and sandbox, in turns:

- ``barrier``: as THOR's official code does it, see ``barrier_rollout.py``;
- ``async``: ``thor_fast.rollout.RolloutScheduler``, each trajectory on its own.

By default a tiny policy solves arithmetic by writing Python, on the CPU. ``--engine scripted``
replays worked solutions instead, 5 ms per token whatever the load: a rollout without a model.
``--sandbox subprocess`` is UNSAFE for any model but the tiny policy.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from barrier_rollout import barrier_rollout, changed_tokens
from command_line import OneLineParser, count
from metering import Meter, MeteredEngine, MeteredSandbox
from report import Update, append_record, first_line, print_table, progress
from rollout_setup import Setup, build

from thor_fast.engines.base import SamplingParams
from thor_fast.errors import ThorError
from thor_fast.rewards import MathAnswerReward
from thor_fast.rewards.math_answer import answers_match, last_boxed
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler, trajectory_seed
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.synthetic import TEST_SEED, Task, task_set
from thor_fast.tools.python_tool import PythonTool
from thor_fast.tools.token_text import TokenBytes

MODES = ("barrier", "async")
RESULTS = Path(__file__).parent / "results" / "rollout_throughput.jsonl"
# THOR's RL setting.
SAMPLING = SamplingParams(temperature=1.0)


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one mode; see :class:`metering.Meter` for the tool seconds."""

    wall_s: float
    episodes: int
    correct: int
    sampled_tokens: int
    changed_tokens: int
    engine_calls: int
    prefill_tokens: int | None
    tool_calls: int
    tool_s: float
    tools_hidden_s: float
    tools_exposed_s: float


async def run_barrier(setup: Setup, tasks: Sequence[Task], update: Update) -> Result:
    """All episodes in rounds, text in between."""
    meter = Meter()
    tokens = TokenBytes(setup.tokenizer)
    prompts = [
        (setup.prompt(task), trajectory_seed(setup.seed, i, 0)) for i, task in enumerate(tasks)
    ]
    started = time.perf_counter()
    episodes = await barrier_rollout(
        MeteredEngine(setup.engine, meter),
        MeteredSandbox(setup.sandbox, meter),
        prompts,
        setup.limits,
        encode=setup.encode,
        tokens=tokens,
        sampling=SAMPLING,
        eos_token_ids=setup.eos_token_ids,
        progress=update,
    )
    wall_s = time.perf_counter() - started
    correct = 0
    for task, episode in zip(tasks, episodes, strict=True):
        answer = last_boxed(episode.said)
        correct += answer is not None and answers_match(answer, task.answer)
    changed = sum(changed_tokens(setup.encode, tokens, e) for e in episodes)
    return _result(meter, wall_s, len(episodes), correct, changed)


async def run_async(setup: Setup, tasks: Sequence[Task], update: Update) -> Result:
    """All episodes on their own, tokens in between."""
    meter = Meter()
    render = Renderer(setup.tokenizer)
    scheduler = RolloutScheduler(
        MeteredEngine(setup.engine, meter),
        MeteredSandbox(setup.sandbox, meter),
        PythonTool(setup.tokenizer),
        encode=ObservationEncoder(setup.tokenizer),
        limits=setup.limits,
        sampling=SamplingParams(temperature=SAMPLING.temperature, seed=setup.seed),
        eos_token_ids=setup.eos_token_ids,
        progress=lambda _, done, total: update(done, total),
    )
    prompts = [Prompt(tuple(setup.encode(setup.prompt(task)))) for task in tasks]
    started = time.perf_counter()
    groups = await scheduler.run(prompts)
    wall_s = time.perf_counter() - started
    trajectories = [group.trajectories[0] for group in groups]
    failed = [t for t in trajectories if t.stop_reason is None or t.stop_reason.is_infrastructure]
    if failed:
        raise ThorError(f"{len(failed)} of {len(tasks)} episodes failed: {failed[0].error}")
    reward = MathAnswerReward(render)
    correct = sum(
        reward(trajectory, task.answer) == 1.0
        for trajectory, task in zip(trajectories, tasks, strict=True)
    )
    # What the engine sampled, by its own record, against what stands in the trajectory.
    final = {str(i): trajectory.token_ids for i, trajectory in enumerate(trajectories)}
    changed = sum(
        final[session.split("/")[-2]][position] != token_id
        for session, sampled in meter.sampled.items()
        for position, token_id in sampled
    )
    return _result(meter, wall_s, len(tasks), correct, changed)


def _result(meter: Meter, wall_s: float, episodes: int, correct: int, changed: int) -> Result:
    return Result(
        wall_s=wall_s,
        episodes=episodes,
        correct=correct,
        sampled_tokens=meter.sampled_tokens,
        changed_tokens=changed,
        engine_calls=meter.engine_calls,
        prefill_tokens=meter.prefill_tokens,
        tool_calls=meter.tool_calls,
        tool_s=meter.tool_s,
        tools_hidden_s=meter.tools_hidden_s,
        tools_exposed_s=meter.tools_exposed_s,
    )


async def measure(
    setup: Setup, tasks: Sequence[Task], modes: Sequence[str], repeats: int
) -> dict[str, list[Result]]:
    """Each mode ``repeats`` times, in turns, the order swapped each time; one short run before."""
    runners = {"barrier": run_barrier, "async": run_async}
    results: dict[str, list[Result]] = {mode: [] for mode in modes}
    try:
        for mode in modes:
            await runners[mode](setup, tasks[:8], lambda done, total: None)
        for repeat in range(repeats):
            for mode in modes if repeat % 2 == 0 else reversed(modes):
                with progress(f"{mode:7} {repeat + 1}/{repeats}") as update:
                    results[mode].append(await runners[mode](setup, tasks, update))
    finally:
        await setup.engine.aclose()
    return results


def table(results: dict[str, list[Result]]) -> list[list[str]]:
    """One row per metric, one column per mode: medians over the repeats."""

    def row(name: str, form: str, value: Any) -> list[str]:
        cells = [name]
        for runs in results.values():
            values = [value(run) for run in runs]
            known = None not in values
            cells.append(format(statistics.median(values), form) if known else "unknown")
        return cells

    rows = [
        row("wall time, s", ".2f", lambda r: r.wall_s),
        row("tokens/s, sampled", ".0f", lambda r: r.sampled_tokens / r.wall_s),
        row("episodes/s", ".2f", lambda r: r.episodes / r.wall_s),
        row("accuracy", ".3f", lambda r: r.correct / r.episodes),
        row("tool calls", ".0f", lambda r: r.tool_calls),
        row("tool time, s, added up", ".3f", lambda r: r.tool_s),
        row("  hidden, wall s", ".3f", lambda r: r.tools_hidden_s),
        row("  exposed, wall s", ".3f", lambda r: r.tools_exposed_s),
        row("engine calls per episode", ".2f", lambda r: r.engine_calls / r.episodes),
        row(
            "prefill tokens per call",
            ".1f",
            lambda r: None if r.prefill_tokens is None else r.prefill_tokens / r.engine_calls,
        ),
        row(
            "tokens changed by re-tokenising",
            ".3%",
            lambda r: r.changed_tokens / r.sampled_tokens,
        ),
    ]
    if set(results) == set(MODES):
        rows.append(["speed", "1.00 x", f"{statistics.median(ratios(results)):.2f} x"])
    return rows


def ratios(results: dict[str, list[Result]]) -> list[float]:
    """Barrier's wall time over async's, per repeat."""
    pairs = zip(results["barrier"], results["async"], strict=True)
    return [barrier.wall_s / ours.wall_s for barrier, ours in pairs]


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
    add("--sandbox", choices=("native", "subprocess"), default="native")
    add("--mode", choices=MODES, help="default: both, in turns")
    add("--episodes", type=count, default=256, help="one task each; default: 256")
    add("--repeats", type=count, default=3, help="runs of each mode; default: 3")
    add("--seed", type=int, default=0, help="of the sampling noise; default: 0")
    add("--max-sequences", type=count, default=64, help="live at a time; default: 64")
    add("--max-context", type=count, default=512, help="tokens per sequence; default: 512")
    add("--output", type=Path, default=RESULTS, help="JSON lines; default: benchmarks/results/")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse(argv)
    modes = MODES if args.mode is None else (args.mode,)
    tasks = task_set(args.episodes, TEST_SEED)
    print(
        f"{args.episodes} episodes, {args.engine} engine, {args.sandbox} sandbox, "
        f"at most {args.max_sequences} live; {' and '.join(modes)}, {args.repeats} times",
        flush=True,
    )
    try:
        setup = build(args, tasks)
        with cast(AbstractContextManager[object], setup.sandbox):
            results = asyncio.run(measure(setup, tasks, modes, args.repeats))
    except ThorError as error:
        print(f"rollout_throughput: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rollout_throughput: interrupted", file=sys.stderr)
        return 130
    params = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
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


if __name__ == "__main__":
    sys.exit(main())
