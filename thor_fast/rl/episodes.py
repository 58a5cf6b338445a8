"""How a run's episodes are made: whole ones, and single steps of them sampled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rollout.branch import branch_failed_steps
from thor_fast.rollout.scheduler import Reward, RolloutScheduler
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import RolloutGroup, StepGroup

__all__ = ["EpisodeSetup"]


@dataclass(frozen=True, slots=True)
class EpisodeSetup:
    """What all episodes of a run have in common; see ``RolloutScheduler``."""

    engine: Engine
    sandbox: Sandbox
    tool: Tool
    encode: Callable[[str], Sequence[int]]
    eos_token_ids: frozenset[int]
    config: TrainerConfig

    def scheduler(self, reward: Reward) -> RolloutScheduler:
        """Of whole episodes, in groups."""
        return RolloutScheduler(
            self.engine,
            self.sandbox,
            self.tool,
            encode=self.encode,
            limits=self.config.limits,
            sampling=SamplingParams(temperature=self.config.temperature),
            eos_token_ids=self.eos_token_ids,
            group_size=self.config.group_size,
            reward=reward,
            max_live=self.config.max_live,
        )

    async def branch(self, groups: Sequence[RolloutGroup], seed: int) -> list[StepGroup]:
        """Step groups of failed calls, where the configuration asks for them."""
        if self.config.branch is None:
            return []
        return await branch_failed_steps(
            self.engine,
            self.sandbox,
            self.tool,
            groups,
            self.config.branch,
            encode=self.encode,
            limits=self.config.limits,
            sampling=SamplingParams(temperature=self.config.temperature, seed=seed),
            eos_token_ids=self.eos_token_ids,
            max_live=self.config.max_live,
        )
