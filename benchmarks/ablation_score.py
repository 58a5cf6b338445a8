"""What a policy does on a set of tasks: answers, calls and tokens, on the real path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import DataError
from thor_fast.rewards import MathAnswerReward
from thor_fast.rollout.backtrack import BacktrackPolicy
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox import Sandbox
from thor_fast.synthetic import Task
from thor_fast.tools.python_tool import PythonTool
from thor_fast.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LIMITS", "Score", "limits_of", "prompts_of", "sample"]

LIMITS = RolloutLimits(max_response_tokens=384, max_tool_calls=5)


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over the episodes of one evaluation.

    ``calls`` and ``failed_calls`` are those the model sees, ``attempts`` those that were rolled
    back. ``sampled_tokens`` counts what the model wrote, rolled back or not.
    """

    episodes: int
    correct: int
    calls: int
    failed_calls: int
    attempts: int
    sampled_tokens: int

    @property
    def accuracy(self) -> float:
        """Correct answers over episodes."""
        return self.correct / self.episodes

    @property
    def call_success(self) -> float | None:
        """Calls that passed over calls that the model sees; ``None`` where there is none."""
        return 1 - self.failed_calls / self.calls if self.calls else None


def limits_of(tool: bool) -> RolloutLimits:
    """Without the tool an episode that writes a block all the same ends there, unanswered."""
    return LIMITS if tool else RolloutLimits(LIMITS.max_response_tokens, max_tool_calls=0)


def prompts_of(tasks: Sequence[Task], render: Renderer, tool: bool) -> list[Prompt]:
    """Each task as the question that asks for Python, or as the one that forbids it."""
    return [
        Prompt(render.prompt(t.prompt if tool else t.direct_prompt), t.answer, t.task_id)
        for t in tasks
    ]


async def sample(
    engine: Engine,
    sandbox: Sandbox,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[Task],
    *,
    tool: bool,
    samples: int,
    seed: int,
    backtrack: BacktrackPolicy | None = None,
) -> Score:
    """``samples`` episodes for each task at temperature 1, the one that RL trains at.

    Raises ``DataError`` where the infrastructure spoilt one: no number is better than a wrong one.
    """
    render = Renderer(tokenizer)
    scheduler = RolloutScheduler(
        engine,
        sandbox,
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=limits_of(tool),
        sampling=SamplingParams(temperature=1.0, seed=seed),
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        group_size=samples,
        reward=MathAnswerReward(render),
        backtrack=backtrack,
    )
    groups = await scheduler.run(prompts_of(tasks, render, tool))
    return _counted([t for group in groups for t in group.trajectories])


def _counted(trajectories: Sequence[Trajectory]) -> Score:
    for trajectory in trajectories:
        if trajectory.reward is None:
            raise DataError(
                f"an episode ended with {trajectory.stop_reason} ({trajectory.error}), "
                "expected an ending that can be scored"
            )
    calls = [c for t in trajectories for c in t.tool_calls if c.passed is not None]
    attempts = [a for t in trajectories for a in t.attempts]
    written = sum(int(t.loss_mask.sum()) for t in trajectories)
    written += sum(sum(segment.loss_mask) for a in attempts for segment in a.segments)
    return Score(
        episodes=len(trajectories),
        correct=sum(t.reward == 1.0 for t in trajectories),
        calls=len(calls),
        failed_calls=sum(c.passed is False for c in calls),
        attempts=len(attempts),
        sampled_tokens=written,
    )
