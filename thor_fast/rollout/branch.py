"""Step groups: a failed call is sampled again, several times, from shortly before it.

THOR's step level (section 3.3): the prefix is cut ``l_suf`` tokens before the failed block, each
continuation is one block, and it is rewarded by whether that block runs::

    parent        prompt | think ```python sun([1]) ``` | NameError ... | ...
    prefix        prompt | th
    continuation             ink of the sum ```python sum([1]) ```           passed: 1.0
    continuation             ink, no code needed: 1 <eos>                    no call: 0.0

The continuations are episodes like any other, run by the scheduler: they begin where the parent
stood at the cut (its calls and its response tokens count for the limits), share the KV of the
prefix and the memo of their group, and end as soon as their first call has a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import ConfigError
from thor_fast.rollout.backtrack import beginning, cut_position, tail
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler
from thor_fast.rollout.seeds import lot, step_number
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import RolloutGroup, StepGroup, Trajectory

__all__ = ["BranchPolicy", "FailedCall", "branch_failed_steps", "continuation", "failed_calls"]


@dataclass(frozen=True, slots=True)
class BranchPolicy:
    """Which failed calls are sampled again, and how often. Defaults are THOR's.

    ``which``: of the failed calls of one trajectory the last, the first, all of them, or one drawn
    by the seed. ``l_suf``: tokens before the block that are sampled again. ``max_groups``: so many
    calls of all trajectories, drawn by the seed, every call as likely as any other; ``None``: all.
    """

    which: Literal["last", "first", "all", "sampled"] = "last"
    l_suf: int = 100
    group_size: int = 8
    max_groups: int | None = None

    def __post_init__(self) -> None:
        if self.which not in ("last", "first", "all", "sampled"):
            raise ConfigError(
                f"which is {self.which!r}, expected 'last', 'first', 'all' or 'sampled'"
            )
        if self.l_suf < 0:
            raise ConfigError(f"l_suf is {self.l_suf}, expected >= 0")
        if self.group_size < 1:
            raise ConfigError(f"group_size is {self.group_size}, expected >= 1")
        if self.max_groups is not None and self.max_groups < 0:
            raise ConfigError(f"max_groups is {self.max_groups}, expected >= 0 or None")


@dataclass(frozen=True, slots=True)
class FailedCall:
    """Call ``call_index`` of ``trajectory``, which the model got wrong."""

    trajectory: Trajectory
    call_index: int


def failed_calls(
    groups: Sequence[RolloutGroup], policy: BranchPolicy, seed: int
) -> list[FailedCall]:
    """The calls to sample again, in the order of the groups.

    A call has failed if it ran and did not pass; what the infrastructure did to it, or that it
    never ran, says nothing about the model. The choice is a pure function of ``seed`` and of the
    trajectories' seeds.
    """
    found = [
        call
        for group in groups
        for trajectory in group.trajectories
        for call in _chosen(trajectory, policy, seed)
    ]
    if policy.max_groups is None or len(found) <= policy.max_groups:
        return found
    drawn = sorted(range(len(found)), key=lambda i: _lot("max_groups", seed, found[i]))
    return [found[i] for i in sorted(drawn[: policy.max_groups])]


async def branch_failed_steps(
    engine: Engine,
    sandbox: Sandbox,
    tool: Tool,
    groups: Sequence[RolloutGroup],
    policy: BranchPolicy,
    *,
    encode: Callable[[str], Sequence[int]],
    limits: RolloutLimits,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
    max_live: int | None = None,
    memo: bool = True,
) -> list[StepGroup]:
    """One group for each of :func:`failed_calls`, in that order.

    ``sampling.seed`` is the base of all seeds: those of a group depend on it, on the parent's seed
    and on the call. ``limits``: those the parents ran under. The rest is as in
    :class:`~thor_fast.rollout.scheduler.RolloutScheduler`. Rewards are
    :attr:`~thor_fast.types.StepGroup.rewards`; ``Trajectory.reward`` of a continuation stays
    ``None``, since it has no answer. Cancelling cancels all; no session stays behind.
    """
    calls = failed_calls(groups, policy, sampling.seed)
    starts = [
        beginning(t, cut_position(t, t.tool_calls[call.call_index], policy.l_suf))
        for call in calls
        for t in (call.trajectory,)
    ]
    scheduler = RolloutScheduler(
        engine,
        sandbox,
        tool,
        encode=encode,
        limits=limits,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        group_size=policy.group_size,
        max_live=max_live,
        memo=memo,
        one_call=True,
    )
    prompts = [
        Prompt(
            start.prompt_ids,
            number=step_number(call.trajectory.seed, call.call_index),
            start=start,
        )
        for call, start in zip(calls, starts, strict=True)
    ]
    return [
        StepGroup(
            call.trajectory,
            call.call_index,
            tuple(start.token_ids),
            [continuation(start, t) for t in group.trajectories],
        )
        for call, start, group in zip(calls, starts, await scheduler.run(prompts), strict=True)
    ]


def _chosen(trajectory: Trajectory, policy: BranchPolicy, seed: int) -> Iterator[FailedCall]:
    failed = [
        FailedCall(trajectory, i) for i, c in enumerate(trajectory.tool_calls) if c.passed is False
    ]
    match policy.which:
        case "all":
            yield from failed
        case "first":
            yield from failed[:1]
        case "last":
            yield from failed[-1:]
        case "sampled" if failed:
            yield min(failed, key=lambda call: _lot("which", seed, call))


def _lot(choice: str, seed: int, call: FailedCall) -> int:
    return lot(choice, seed, call.trajectory.seed, call.call_index)


def continuation(start: Trajectory, ended: Trajectory) -> Trajectory:
    """What an episode added to its ``start``, as a trajectory whose prompt is the prefix."""
    prefix = tuple(start.token_ids)
    return Trajectory(
        prefix,
        list(tail(ended, len(prefix))),
        ended.tool_calls[len(start.tool_calls) :],
        ended.stop_reason,
        seed=ended.seed_at(len(prefix)),
        weight_version=ended.weight_version,
        error=ended.error,
        metrics=ended.metrics,
    )
