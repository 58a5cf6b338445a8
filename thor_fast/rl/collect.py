"""A step's rollouts: prompts in turn, until enough groups have something to learn from.

Dynamic sampling (DAPO 2503.14476; THOR): a group whose rewards are all equal has no group-relative
advantage, so batch after batch is rolled out until enough groups differ within themselves, or
``max_batches`` have been tried. Everything here is a pure function of the seed, the step and the
weights: which prompts come, which noise they are sampled with, which of more groups than needed are
kept (the first, in the order of the prompts), and on how many ranks, each of which rolls out every
so-manieth prompt of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thor_fast.errors import DataError, EngineError, RewardError, SandboxError
from thor_fast.rl.advantages import AdvantagePolicy, is_informative
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler, trajectory_seed
from thor_fast.types import RolloutGroup, StopReason, Trajectory

__all__ = ["Collected", "Collector", "PromptOrder"]

Gather = Callable[[list[Any]], list[Any]]
"""The lists of all ranks, one behind the other; the same on each of them."""


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
    """``groups``: to train on, of this rank; ``sampled``: all that this rank rolled out.

    Over all ranks: ``informative`` groups could be trained on, ``kept`` of them are, of so many
    ``batches``. ``position``: of the next prompt.
    """

    position: int
    groups: list[RolloutGroup] = field(default_factory=list)
    sampled: list[RolloutGroup] = field(default_factory=list)
    informative: int = 0
    kept: int = 0
    batches: int = 0


@dataclass(frozen=True, slots=True)
class Collector:
    """Rolls out ``prompts`` at a time, its rank's share of them, at most ``max_batches`` times."""

    scheduler: RolloutScheduler
    order: PromptOrder
    policy: AdvantagePolicy
    prompts: int
    max_batches: int
    rank: int
    ranks: int
    gather: Gather

    async def collect(self, position: int, seed: int) -> Collected:
        """Until ``prompts`` informative groups are there, or all batches have been tried.

        Raises ``EngineError``, ``SandboxError`` or ``RewardError`` where nothing of a batch was
        scored on any rank.
        """
        found = Collected(position)
        mine: dict[int, RolloutGroup] = {}
        everybodys: list[int] = []
        while len(everybodys) < self.prompts and found.batches < self.max_batches:
            groups = await self._batch(found.position, trajectory_seed(seed, found.batches, 0))
            mine |= {i: g for i, g in groups.items() if is_informative(g, self.policy)}
            everybodys = sorted(self.gather(sorted(mine)))
            found.sampled += groups.values()
            found.position += self.prompts
            found.batches += 1
        kept = everybodys[: self.prompts]
        found.informative, found.kept = len(everybodys), len(kept)
        found.groups = [mine[i] for i in kept if i in mine]
        return found

    async def _batch(self, position: int, seed: int) -> dict[int, RolloutGroup]:
        """The rank's groups of a batch, by their place in the endless order."""
        batch = self.order.take(position, self.prompts)
        numbers = range(self.rank, self.prompts, self.ranks)
        self.scheduler.sampling = replace(self.scheduler.sampling, seed=seed)
        groups = await self.scheduler.run([replace(batch[n], number=n) for n in numbers])
        _check_scored([t for group in groups for t in group.trajectories], self.gather)
        return {position + n: group for n, group in zip(numbers, groups, strict=True)}


def _check_scored(trajectories: Sequence[Trajectory], gather: Gather) -> None:
    """The same error on all ranks, lest some of them wait for one that has given up."""
    lost = [(t.stop_reason, t.error) for t in trajectories if t.reward is None]
    if any(gather([len(lost) < len(trajectories)])):
        return
    lost = gather(lost)
    reason, error = lost[0]
    kinds: dict[Any, type[EngineError | SandboxError | RewardError]] = {
        StopReason.ENGINE_FAILURE: EngineError,
        StopReason.TOOL_FAILURE: SandboxError,
    }
    raise kinds.get(reason, RewardError)(
        f"none of {len(lost)} trajectories was scored; the first ended with {reason} "
        f"({error or 'no error'})"
    )
