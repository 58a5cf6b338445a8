"""Self-correction over many prompts: a failed call is rolled back and written again.

The retries themselves are part of the loop (:mod:`thor_fast.rollout.backtrack`); here they are run
and counted. Every engine can be behind it: where it holds no KV to truncate, what is left of the
context is sent again, and prefix caches see to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.rollout import (
    BacktrackPolicy,
    Finished,
    Prompt,
    RolloutLimits,
    RolloutScheduler,
)
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import RolloutGroup, TokenSource, ToolCall, Trajectory

__all__ = ["CorrectionCounts", "count_corrections", "self_correct"]


@dataclass(frozen=True, slots=True)
class CorrectionCounts:
    """What self-correction did, summed over trajectories. A *place* is where one call stands.

    ``places``: where a call ran; ``first_failed``: where the first try failed; ``recovered``: where
    a later one passed; ``given_up``: where the trajectory goes on behind a failed call; the rest of
    ``first_failed`` went on without a call there, or ended. ``attempts``: calls rolled back;
    ``rolled_back_tokens``: sampled in vain for them. A first try that the infrastructure failed is
    no place.
    """

    places: int = 0
    first_failed: int = 0
    recovered: int = 0
    given_up: int = 0
    attempts: int = 0
    rolled_back_tokens: int = 0

    @property
    def first_pass_rate(self) -> float | None:
        """Of the places, the part where the first try passed; ``None`` without any."""
        return (self.places - self.first_failed) / self.places if self.places else None

    @property
    def final_pass_rate(self) -> float | None:
        """Of the places, the part where one of the tries passed in the end."""
        passed = self.places - self.first_failed + self.recovered
        return passed / self.places if self.places else None


def count_corrections(groups: Sequence[RolloutGroup]) -> CorrectionCounts:
    """Counts over all trajectories of ``groups``."""
    places = [p for group in groups for t in group.trajectories for p in _places(t)]
    failed = [p for p in places if p[0] is False]
    attempts = [a for group in groups for t in group.trajectories for a in t.attempts]
    return CorrectionCounts(
        places=len(places),
        first_failed=len(failed),
        recovered=sum(last is True for _, last in failed),
        given_up=sum(last is False for _, last in failed),
        attempts=len(attempts),
        rolled_back_tokens=sum(
            len(s) for a in attempts for s in a.segments if s.source is TokenSource.MODEL
        ),
    )


async def self_correct(
    engine: Engine,
    sandbox: Sandbox,
    tool: Tool,
    prompts: Sequence[Prompt],
    policy: BacktrackPolicy,
    *,
    encode: Callable[[str], Sequence[int]],
    limits: RolloutLimits,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
    group_size: int = 1,
    reward: Callable[[Trajectory, str], float | None] | None = None,
    max_live: int | None = None,
    progress: Callable[[Finished, int, int], None] | None = None,
) -> tuple[list[RolloutGroup], CorrectionCounts]:
    """One group per prompt, sampled under ``policy``, and what the retries did.

    Arguments are those of :class:`~thor_fast.rollout.scheduler.RolloutScheduler`.
    """
    scheduler = RolloutScheduler(
        engine,
        sandbox,
        tool,
        encode=encode,
        limits=limits,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        group_size=group_size,
        reward=reward,
        max_live=max_live,
        backtrack=policy,
        progress=progress,
    )
    groups = await scheduler.run(prompts)
    return groups, count_corrections(groups)


def _places(trajectory: Trajectory) -> list[tuple[bool, bool | None]]:
    """Whether the first try passed, and whether the one that stands does, per place of a call."""
    tries: dict[int, list[ToolCall]] = {}
    for attempt in trajectory.attempts:
        tries.setdefault(attempt.call_index, []).append(attempt.call)
    for index, call in enumerate(trajectory.tool_calls):
        tries.setdefault(index, []).append(call)
    found = []
    for index, calls in tries.items():
        first = min(calls, key=lambda call: call.attempt).passed
        stands = index < len(trajectory.tool_calls)
        if first is not None:
            found.append((first, trajectory.tool_calls[index].passed if stands else None))
    return found
