"""The trainer: reinforcement learning with a tool, from rollouts to weights and round again.

Who waits for whom (one column each; time runs down)::

    Trainer.train                  engine, sandbox, reward            model, optimizer
    -------------                  -----------------------            ----------------
    collect: prompts ----------->  episodes, each on its own
      too few groups that differ:  (scheduler.py: nobody waits
      roll out another batch       for a group or a batch)
    <-- groups, scored ----------
    branch, if asked to ------->   failed calls are sampled again
    <-- step groups -------------  (branch.py), one block each
    trajectories are written
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

With several ranks (``accelerate launch``) each has an engine and a sandbox of its own and rolls out
its share of the prompts. They meet where groups are counted, where gradients are added up, and when
a checkpoint is written.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

try:
    from accelerate.utils import gather_object  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the trainer needs accelerate, which is not installed: pip install 'thor_fast[train]'"
    ) from error

from thor_fast.engines.base import Engine
from thor_fast.errors import ConfigError, ThorError, TrainingError
from thor_fast.rl.advantages import hierarchical_advantages, is_informative
from thor_fast.rl.collect import Collected, Collector, PromptOrder
from thor_fast.rl.episodes import EpisodeSetup
from thor_fast.rl.learner import Learner
from thor_fast.rl.model_setup import accelerator_of, adapted, check_device, copy_weights
from thor_fast.rl.progress import MetricsLog
from thor_fast.rl.resume import Checkpointing, RunState
from thor_fast.rl.rollout_metrics import (
    branch_metrics,
    episode_rows,
    rollout_metrics,
    step_rows,
)
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rollout.records import TrajectoryWriter
from thor_fast.rollout.scheduler import Prompt, Reward
from thor_fast.rollout.seeds import trajectory_seed
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import RolloutGroup, StepGroup

__all__ = ["Trainer"]


class Trainer:
    """Trains ``model``, in place; see the module's diagram.

    ``engine`` samples from the same weights: a ``PagedEngine`` over ``model``, or over
    ``engine_model``, which then gets a copy of them after each step; that is needed where ``model``
    is sharded, and allows another dtype. ``encode``, ``eos_token_ids``: as for
    ``RolloutScheduler``. ``reward(trajectory, reference)`` gives a score, or ``None`` where there
    is none. ``output_dir``: where metrics and checkpoints go; made if missing. ``resume``: go on
    from the newest checkpoint there, if there is one.

    Raises ``ConfigError`` for an ``output_dir`` with checkpoints that is not to be resumed, or that
    is of a run with other settings; for a model that is not on accelerate's device.
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
        engine_model: PreTrainedModel | None = None,
        output_dir: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.engine = config, engine
        self._output_dir = output_dir
        self._accelerator = accelerator_of(config, output_dir)
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)
        self._episodes = EpisodeSetup(engine, sandbox, tool, encode, eos_token_ids, config)
        self._collector = Collector(
            self._episodes.scheduler(reward),
            PromptOrder(prompts, config.seed),
            config.advantages,
            config.train_prompts,
            config.max_batches,
            self._accelerator.process_index,
            self._accelerator.num_processes,
            gather_object,
        )
        if self._accelerator.is_fsdp2 and engine_model is None:
            raise ConfigError("the model is to be sharded, expected an engine_model for the engine")
        check_device(model, self._accelerator)
        self._learner = Learner(adapted(model, config.lora), self._accelerator, config)
        self._engine_model = None if engine_model is None else adapted(engine_model, config.lora)
        self._checkpoints = Checkpointing(self._learner, self._accelerator, config, output_dir)
        self.state: RunState = self._checkpoints.begin(resume=resume)

    def train(self) -> list[dict[str, float]]:
        """Steps until ``config.steps`` are done; returns the metrics of those done here.

        Raises ``TrainingError`` where a step cannot be done; it names the last checkpoint, which is
        what to go on from.
        """
        log = MetricsLog(
            self._accelerator, self._output_dir, config=self.config, done=self.state.step
        )
        history = []
        try:
            with asyncio.Runner() as runner:
                stale = self.state.weight_version > self.engine.weight_version
                if stale or self._engine_model is not None:
                    runner.run(self._give_weights(self.state.weight_version))
                while self.state.step < self.config.steps:
                    try:
                        metrics = runner.run(self._step())
                    except (ThorError, RuntimeError, MemoryError, ExceptionGroup) as error:
                        self._explain(_first(error))
                        raise
                    log.log(self.state.step, metrics)
                    history.append(metrics)
                    self._checkpoints.after_step(self.state, metrics)
        finally:
            log.close()
        return history

    def save_policy(self, path: Path) -> None:
        """The model as it is now, an adapter merged into it: what ``from_pretrained`` reads.

        On all ranks, if there are several.
        """
        self._checkpoints.save_policy(path)

    def _explain(self, error: Exception) -> None:
        """Raise ``TrainingError`` for what is no bug of ours."""
        hint = ""
        if _is_out_of_memory(error):
            size = self.config.micro_batch_tokens
            hint = f"; out of memory: try fewer micro_batch_tokens than {size}"
        elif not isinstance(error, ThorError):
            return
        raise TrainingError(
            f"step {self.state.step + 1}: {error}{hint}; {self._checkpoints.describe()}"
        ) from error

    async def _step(self) -> dict[str, float]:
        c, state, started = self.config, self.state, time.perf_counter()
        seed = trajectory_seed(c.seed, state.step, 0)
        found = await self._collector.collect(state.position, seed)
        step_groups = await self._episodes.branch(found.sampled, seed)
        self._record(found.sampled, step_groups)
        rolled_out = time.perf_counter()
        metrics = self._of_rollouts(found) | branch_metrics(gather_object(step_rows(step_groups)))
        steps = [group for group in step_groups if is_informative(group, c.advantages)]
        sequences = hierarchical_advantages(found.groups, steps, c.advantages)
        metrics |= self._learner.update(sequences)
        if metrics["updates"]:
            await self._give_weights(state.weight_version + 1)
        else:
            state.skipped_steps += 1
        state.step += 1
        state.position = found.position
        ended = time.perf_counter()
        return metrics | {
            "skipped_steps": float(state.skipped_steps),
            "rollout_s": rolled_out - started,
            "update_s": ended - rolled_out,
            "step_s": ended - started,
        }

    def _record(self, groups: Sequence[RolloutGroup], step_groups: Sequence[StepGroup]) -> None:
        """All of a step's trajectories, in a file of its own: a step done again writes it anew."""
        if self._output_dir is None:
            return
        folder = self._output_dir / "trajectories"
        folder.mkdir(exist_ok=True)
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        suffix = f"-rank{rank}" if ranks > 1 else ""
        path = folder / f"step-{self.state.step + 1:06d}{suffix}.jsonl"
        path.unlink(missing_ok=True)
        with TrajectoryWriter(path) as writer:
            writer.write(groups, step_groups, step=self.state.step + 1)

    async def _give_weights(self, version: int) -> None:
        """To the engine, as ``version`` or a later one; no call is in flight."""
        if self._engine_model is not None:
            copy_weights(self._learner.model, self._engine_model)
        self.state.weight_version = max(version, self.engine.weight_version + 1)
        await self.engine.update_weights(self.state.weight_version)

    def _of_rollouts(self, found: Collected) -> dict[str, float]:
        wanted = self.config.train_prompts
        if found.kept < wanted and not self.state.warned:
            self.state.warned = True
            warnings.warn(
                f"step {self.state.step + 1}: {found.batches} batches of {wanted} prompts gave "
                f"{found.informative} groups to learn from, expected {wanted}; training on what "
                "there is, here and in later steps (metrics: groups, skipped_steps)",
                RuntimeWarning,
                stacklevel=2,
            )
        return rollout_metrics(gather_object(episode_rows(found.sampled))) | {
            "batches": float(found.batches),
            "groups": float(found.kept),
            "informative": found.informative / (wanted * found.batches),
        }


def _first(error: Exception) -> Exception:
    """Of several episodes that failed alike the first error; a bug among them is not hidden."""
    if isinstance(error, ExceptionGroup) and error.split(ThorError)[1] is None:
        return _first(error.exceptions[0])
    return error


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU torch has no class of its own for it.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "allocate memory" in str(error)
    )
