"""Measure a tiny policy: ``python -m thor_fast.synthetic.evaluate`` prints accuracy per family.

Runs the real path: embedded engine, rollout scheduler, native sandbox, exact answer reward.
"Without the tool" is the prompt form that forbids code (trained on, see ``docs``) and no call is
run: an episode that writes a block all the same ends there, unanswered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.engines.paged import PagedEngine
from thor_fast.errors import DataError
from thor_fast.rewards import MathAnswerReward
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox import NativeSandbox, Sandbox
from thor_fast.synthetic.policy import load_policy, tiny_policy_path
from thor_fast.synthetic.tasks import HELD_OUT_FAMILIES, TEST_SEED, TRAINED_FAMILIES, Task, task_set
from thor_fast.tools.python_tool import PythonTool
from thor_fast.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ACCURACY_FILE", "ARMS", "Arm", "Measurement", "main", "measure"]

ACCURACY_FILE = "accuracy.json"
_SCHEMA_VERSION = 1
_MAX_SEQUENCES = 64
_MAX_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of asking: with the tool or for a direct answer, at a temperature, on families."""

    name: str
    tool: bool
    temperature: float
    families: tuple[str, ...]


ARMS = (
    Arm("tool, greedy", True, 0.0, TRAINED_FAMILIES),
    Arm("tool, T=1", True, 1.0, TRAINED_FAMILIES),
    Arm("direct, greedy", False, 0.0, TRAINED_FAMILIES),
    Arm("direct, T=1", False, 1.0, TRAINED_FAMILIES),
    Arm("held out, greedy", True, 0.0, HELD_OUT_FAMILIES),
    Arm("held out, T=1", True, 1.0, HELD_OUT_FAMILIES),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Counts over the episodes of one arm. ``correct``, ``episodes``: per family.

    ``first_calls``: episodes that made a call; ``first_failed``: whose first call failed;
    ``recovered``: of these, the ones answered correctly in the end.
    """

    arm: str
    episodes: dict[str, int]
    correct: dict[str, int]
    calls: int
    first_calls: int
    first_failed: int
    recovered: int
    response_tokens: int

    @property
    def accuracy(self) -> float:
        """Correct answers over all episodes of the arm, in [0, 1]."""
        return sum(self.correct.values()) / sum(self.episodes.values())


def measure(
    arm: Arm,
    tasks: Sequence[Task],
    engine: Engine,
    sandbox: Sandbox,
    tokenizer: PreTrainedTokenizerFast,
) -> Measurement:
    """Sample one episode per task. Raises ``DataError`` if the infrastructure spoilt any."""
    render = Renderer(tokenizer)
    scheduler = RolloutScheduler(
        engine,
        sandbox,
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=RolloutLimits(max_response_tokens=384, max_tool_calls=5 if arm.tool else 0),
        sampling=SamplingParams(temperature=arm.temperature),
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        reward=MathAnswerReward(render),
    )
    prompts = [
        Prompt(render.prompt(t.prompt if arm.tool else t.direct_prompt), t.answer, t.task_id)
        for t in tasks
    ]
    groups = asyncio.run(scheduler.run(prompts))
    return _count(arm, tasks, [group.trajectories[0] for group in groups])


def _count(arm: Arm, tasks: Sequence[Task], trajectories: Sequence[Trajectory]) -> Measurement:
    episodes, correct = dict.fromkeys(arm.families, 0), dict.fromkeys(arm.families, 0)
    first_calls = first_failed = recovered = 0
    for task, trajectory in zip(tasks, trajectories, strict=True):
        if trajectory.reward is None:
            raise DataError(
                f"task {task.task_id} ended with {trajectory.stop_reason} ({trajectory.error}), "
                "expected an ending that can be scored"
            )
        right = trajectory.reward == 1.0
        episodes[task.family] += 1
        correct[task.family] += right
        if trajectory.tool_calls and trajectory.tool_calls[0].passed is not None:
            failed = trajectory.tool_calls[0].passed is False
            first_calls += 1
            first_failed += failed
            recovered += failed and right
    return Measurement(
        arm=arm.name,
        episodes=episodes,
        correct=correct,
        calls=sum(len(t.tool_calls) for t in trajectories),
        first_calls=first_calls,
        first_failed=first_failed,
        recovered=recovered,
        response_tokens=sum(len(t.response_ids) for t in trajectories),
    )


def table(measurements: Sequence[Measurement]) -> str:
    """Accuracy per arm and family, then how many first calls failed and were recovered from."""
    lines = []
    for m in measurements:
        n = sum(m.episodes.values())
        lines.append(
            f"{m.arm:<18}{m.accuracy:7.1%}  of {n}, {m.response_tokens / n:.0f} tokens each"
        )
        lines += [f"  {f:<16}{m.correct[f] / m.episodes[f]:7.1%}" for f in m.episodes]
        if m.first_calls:
            lines.append(
                f"  first call failed {m.first_failed}/{m.first_calls}, answered correctly after "
                f"that {m.recovered}/{m.first_failed}; {m.calls / n:.2f} calls each"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policy", type=Path, default=tiny_policy_path(), help="trained policy")
    parser.add_argument("--per-family", type=int, default=100, help="tasks per family and arm")
    parser.add_argument("--write", action="store_true", help=f"record in POLICY/{ACCURACY_FILE}")
    args = parser.parse_args(argv)
    if args.per_family < 1:
        parser.error(f"--per-family is {args.per_family}, expected at least 1")
    try:
        model, tokenizer = load_policy(args.policy)
    except DataError as error:
        parser.error(str(error))
    measurements = []
    with NativeSandbox() as sandbox:
        for arm in ARMS:
            tasks = task_set(args.per_family * len(arm.families), TEST_SEED, arm.families)
            engine = PagedEngine(model, max_sequences=_MAX_SEQUENCES, max_context=_MAX_CONTEXT)
            measurements.append(measure(arm, tasks, engine, sandbox, tokenizer))
            asyncio.run(engine.aclose())
            print(table(measurements[-1:]), flush=True)
    if args.write:
        record = {
            "schema_version": _SCHEMA_VERSION,
            "task_seed": TEST_SEED,
            "measurements": [asdict(m) for m in measurements],
        }
        text = json.dumps(record, indent=1) + "\n"
        (args.policy / ACCURACY_FILE).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
