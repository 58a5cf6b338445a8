"""A step's rollouts: prompts in turn, until enough groups have something to learn from.

Dynamic sampling (DAPO 2503.14476; THOR): a group whose rewards are all equal has no group-relative
advantage, so batch after batch is rolled out until ``train_prompts`` groups differ within
themselves, or ``max_batches`` have been tried. Everything here is a pure function of the seed, the
step and the weights: which prompts come, which noise they are sampled with, which of more groups
than needed are kept (the first, in the order of the prompts).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thor_fast.errors import DataError, EngineError, RewardError, SandboxError
from thor_fast.rl.advantages import AdvantagePolicy, is_informative
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler, trajectory_seed
from thor_fast.types import RolloutGroup, StopReason

__all__ = ["Collected", "PromptOrder", "collect"]


class PromptOrder:
    """All prompts in an order that is new in each epoch, without end: an index into it is all the
    state there is.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("prompts is empty, expected at least one")
        self._prompts, self._seed = prompts, seed
        self._epoch, self._order = -1, list[int]()

    def take(self, position: int, n: int) -> list[Prompt]:
        """Prompts ``position`` to ``position + n`` of the endless order."""
        return [self._at(i) for i in range(position, position + n)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._prompts)))
            rng = random.Random(f"prompts/{self._seed}/{epoch}")  # noqa: S311 - not for secrets
            rng.shuffle(self._order)
        return self._prompts[self._order[place]]


@dataclass(slots=True)
class Collected:
    """``groups``: to train on; ``sampled``: all that were rolled out, ``informative`` of them could
    be trained on; ``position``: of the next prompt; ``batches``: how many were tried.
    """

    position: int
    groups: list[RolloutGroup] = field(default_factory=list)
    sampled: list[RolloutGroup] = field(default_factory=list)
    batches: int = 0
    informative: int = 0


async def collect(
    scheduler: RolloutScheduler,
    order: PromptOrder,
    position: int,
    *,
    prompts: int,
    max_batches: int,
    seed: int,
    policy: AdvantagePolicy,
) -> Collected:
    """Roll out until ``prompts`` informative groups are there; fewer come with a warning.

    Raises ``EngineError``, ``SandboxError`` or ``RewardError`` where nothing of a batch was scored.
    """
    found = Collected(position)
    while len(found.groups) < prompts and found.batches < max_batches:
        scheduler.sampling = replace(
            scheduler.sampling, seed=trajectory_seed(seed, found.batches, 0)
        )
        groups = await scheduler.run(order.take(found.position, prompts))
        found.position += prompts
        found.batches += 1
        _check_scored(groups)
        found.sampled += groups
        found.groups += [group for group in groups if is_informative(group, policy)]
    found.informative = len(found.groups)
    if found.informative < prompts:
        warnings.warn(
            f"{found.batches} batches of {prompts} prompts gave {found.informative} groups whose "
            f"rewards differ, expected {prompts}; training on what there is",
            RuntimeWarning,
            stacklevel=2,
        )
    del found.groups[prompts:]
    return found


def _check_scored(groups: Sequence[RolloutGroup]) -> None:
    trajectories = [t for group in groups for t in group.trajectories]
    if any(t.reward is not None for t in trajectories):
        return
    first = trajectories[0]
    kind = {StopReason.ENGINE_FAILURE: EngineError, StopReason.TOOL_FAILURE: SandboxError}.get(
        first.stop_reason or StopReason.CANCELLED, RewardError
    )
    raise kind(
        f"none of {len(trajectories)} trajectories was scored; the first ended with "
        f"{first.stop_reason} ({first.error or 'no error'})"
    )
