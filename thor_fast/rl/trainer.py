"""The trainer: reinforcement learning with a tool, from rollouts to weights and round again.

Who waits for whom (one column each; time runs down)::

    Trainer.train                  engine, sandbox, reward            model, optimizer
    -------------                  -----------------------            ----------------
    collect: prompts ----------->  episodes, each on its own
      too few groups that differ:  (scheduler.py: nobody waits
      roll out another batch       for a group or a batch)
    <-- groups, scored ----------
    advantages, per group
    pack: micro-batches of a token budget
    for each of k mini-batches ------------------------------------>  forward, loss, backward
                                                                      per micro-batch
                                                                      clip, optimizer step
    update_weights(version) ---->  takes the weights as they are,
                                   forgets its KV
    metrics, checkpoint

Rollouts and updates alternate: a step's trajectories are all of one weight version, and the engine
is idle while weights change. Steps are a pure function of the weights before them, the seed and
their number, so a run that was cut off goes on as if it had not been.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import ThorError, TrainingError
from thor_fast.rl.advantages import hierarchical_advantages
from thor_fast.rl.collect import Collected, PromptOrder, collect
from thor_fast.rl.learner import Learner
from thor_fast.rl.progress import MetricsLog, rollout_metrics
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rollout.scheduler import Prompt, Reward, RolloutScheduler, trajectory_seed
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool

__all__ = ["Trainer"]


class Trainer:
    """Trains ``model``, in place; see the module's diagram.

    ``engine`` samples from the same weights: a ``PagedEngine`` over ``model``. ``encode`` and
    ``eos_token_ids``: as for ``RolloutScheduler``. ``reward(trajectory, reference)`` gives a score,
    or ``None`` where there is none. ``output_dir``: where metrics are written; made if missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        sandbox: Sandbox,
        tool: Tool,
        prompts: Sequence[Prompt],
        *,
        encode: Callable[[str], Sequence[int]],
        reward: Reward,
        eos_token_ids: frozenset[int],
        config: TrainerConfig,
        output_dir: Path | None = None,
    ) -> None:
        self.config, self._engine = config, engine
        self._accelerator = Accelerator()
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
        self._output_dir = output_dir
        self._order = PromptOrder(prompts, config.seed)
        self._scheduler = RolloutScheduler(
            engine,
            sandbox,
            tool,
            encode=encode,
            limits=config.limits,
            sampling=SamplingParams(temperature=config.temperature),
            eos_token_ids=eos_token_ids,
            group_size=config.group_size,
            reward=reward,
            max_live=config.max_live,
        )
        self._learner = Learner(model, self._accelerator, config)
        self.step = 0
        """Steps done."""
        self.skipped_steps = 0
        """Those of them that found nothing to learn from."""
        self._position = 0

    def train(self) -> list[dict[str, float]]:
        """Steps until ``config.steps`` are done; returns the metrics of each.

        Raises ``TrainingError`` where a step cannot be done; the weights are those before it.
        """
        log = MetricsLog(self._accelerator, self._output_dir, self.config.steps)
        history = []
        try:
            with asyncio.Runner() as runner:
                while self.step < self.config.steps:
                    try:
                        metrics = runner.run(self._step())
                    except ThorError as error:
                        raise TrainingError(f"step {self.step + 1}: {error}") from error
                    self.step += 1
                    log.log(self.step, metrics)
                    history.append(metrics)
        finally:
            log.close()
        return history

    async def _step(self) -> dict[str, float]:
        c, started = self.config, time.perf_counter()
        found = await collect(
            self._scheduler,
            self._order,
            self._position,
            prompts=c.train_prompts,
            max_batches=c.max_batches,
            seed=trajectory_seed(c.seed, self.step, 0),
            policy=c.advantages,
        )
        rolled_out = time.perf_counter()
        sequences = hierarchical_advantages(found.groups, [], c.advantages)
        metrics = _of_rollouts(found)
        if sequences:
            metrics |= self._learner.update(sequences)
            await self._engine.update_weights(self._engine.weight_version + 1)
        else:
            self.skipped_steps += 1
        self._position = found.position
        metrics |= {
            "skipped_steps": float(self.skipped_steps),
            "rollout_s": rolled_out - started,
            "update_s": time.perf_counter() - rolled_out,
            "step_s": time.perf_counter() - started,
        }
        return metrics


def _of_rollouts(found: Collected) -> dict[str, float]:
    return rollout_metrics(found.sampled) | {
        "batches": float(found.batches),
        "groups": float(len(found.groups)),
        "informative": found.informative / len(found.sampled),
    }
