"""A trainer's state to a checkpoint and back, so that a run that was cut off goes on exactly."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.utils import logging

from thor_fast.config import dump_toml, load_toml
from thor_fast.errors import ConfigError, DataError
from thor_fast.rl import checkpoints
from thor_fast.rl.learner import Learner
from thor_fast.rl.progress import flat
from thor_fast.rl.settings import TrainerConfig

__all__ = ["Checkpointing", "RunState"]

# What may differ in the run that goes on: none of it decides what a step does.
_FREE = {"steps", "checkpoint_every", "keep_checkpoints", "trackers"}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


@dataclass(slots=True)
class RunState:
    """Where a run is; the names are those of ``checkpoints.Progress``."""

    step: int = 0
    position: int = 0
    weight_version: int = 0
    skipped_steps: int = 0
    warned: bool = False


class Checkpointing:
    """Writes and reads the checkpoints of one run under ``output_dir``; without one, none."""

    def __init__(
        self,
        learner: Learner,
        accelerator: Accelerator,
        config: TrainerConfig,
        output_dir: Path | None,
    ) -> None:
        self._learner, self._accelerator, self._config = learner, accelerator, config
        self._folder = None if output_dir is None else output_dir / "checkpoints"

    def begin(self, *, resume: bool) -> RunState:
        """The state to go on from: the newest checkpoint's, or the start's."""
        newest = self._newest()
        if newest is None:
            torch.manual_seed(self._config.seed)
            return RunState()
        if not resume:
            raise ConfigError(f"{newest} is there, expected resume or an empty output_dir")
        progress = checkpoints.read_progress(newest)
        self._check_same_run(newest, progress)
        training = checkpoints.read_training(newest)
        self._load_model(newest / "model")
        learner = self._learner
        set_optimizer_state_dict(
            learner.model, learner.optimizer, training["optimizer"], options=_WHOLE
        )
        learner.schedule.load_state_dict(training["schedule"])
        checkpoints.restore_random(training["random"][self._accelerator.process_index])
        return RunState(
            progress.step, progress.position, progress.weight_version, progress.skipped_steps
        )

    def after_step(self, state: RunState, metrics: dict[str, float]) -> None:
        """Write a checkpoint if it is time for one, and after the last step."""
        due = state.step % self._config.checkpoint_every == 0 or state.step == self._config.steps
        if self._folder is None or not due:
            return
        learner = self._learner
        training = {
            "optimizer": get_optimizer_state_dict(learner.model, learner.optimizer, options=_WHOLE),
            "schedule": learner.schedule.state_dict(),
            "random": gather_object([checkpoints.random_states()]),
        }
        weights = get_model_state_dict(learner.model, options=_WHOLE)
        if self._accelerator.is_main_process:
            progress = checkpoints.Progress(
                state.step,
                state.position,
                state.weight_version,
                state.skipped_steps,
                self._accelerator.num_processes,
                metrics,
            )
            checkpoints.write(
                self._folder,
                progress,
                config=dump_toml(self._config),
                training=training,
                save_model=lambda path: _save(learner.model, path, weights),
                keep=self._config.keep_checkpoints,
            )
        self._accelerator.wait_for_everyone()

    def save_policy(self, path: Path) -> None:
        """The whole model, without what is needed to train on. An adapter is merged into a copy."""
        model = self._learner.model
        if self._config.lora is not None:
            model = copy.deepcopy(model).merge_and_unload()
        weights = get_model_state_dict(model, options=_WHOLE)
        if self._accelerator.is_main_process:
            _save(model, path, weights)
        self._accelerator.wait_for_everyone()

    def describe(self) -> str:
        """For messages: where the last checkpoint is."""
        newest = self._newest()
        return "there is no checkpoint" if newest is None else f"the last checkpoint is {newest}"

    def _newest(self) -> Path | None:
        return None if self._folder is None else checkpoints.newest(self._folder)

    def _check_same_run(self, path: Path, progress: checkpoints.Progress) -> None:
        then, now = flat(load_toml(path / "config.toml", TrainerConfig)), flat(self._config)
        for name in sorted((then.keys() | now.keys()) - _FREE):
            if then.get(name) != now.get(name):
                raise ConfigError(
                    f"{name} is {now.get(name)!r}, expected {then.get(name)!r} as in {path}"
                )
        if progress.processes != self._accelerator.num_processes:
            raise ConfigError(
                f"{self._accelerator.num_processes} processes, expected {progress.processes} as in "
                f"{path}"
            )

    def _load_model(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise DataError(f"{path} has no weights, expected files named *.safetensors")
        state: dict[str, Any] = {}
        for file in files:
            state |= load_file(file)
        if self._config.lora is None:
            expected = set(get_model_state_dict(self._learner.model)) - _tied(self._learner.model)
            if state.keys() != expected:
                raise DataError(
                    f"{path} has {len(state)} tensors, expected the {len(expected)} of the model"
                )
            set_model_state_dict(self._learner.model, state, options=_WHOLE)
        else:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self._learner.model, state)


def _save(model: Any, path: Path, weights: dict[str, Any]) -> None:
    # A copy of a tied weight is not seen to be one: it is left out by name.
    tied = _tied(model)
    kept = {name: value for name, value in weights.items() if name not in tied}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(path, state_dict=kept)
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _tied(model: torch.nn.Module) -> set[str]:
    """Names of parameters that are another one's, further names of it."""
    seen: set[int] = set()
    again = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            again.add(name)
        seen.add(id(parameter))
    return again
