"""What is put around a model before it is trained: accelerate, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from thor_fast.errors import ConfigError
from thor_fast.rl.settings import LoraSettings, TrainerConfig

__all__ = [
    "accelerator_of",
    "adapted",
    "check_device",
    "copy_weights",
    "enable_checkpointing",
    "sharded",
    "whole",
]


def accelerator_of(config: TrainerConfig, output_dir: Path | None) -> Accelerator:
    """Accelerate's view of the machine, with the trackers asked for.

    Raises ``ConfigError`` for a tracker that is unknown or not installed.
    """
    names = [name.strip() for name in config.trackers.split(",") if name.strip()]
    if names and output_dir is None:
        raise ConfigError(f"trackers is {config.trackers!r}, expected an output_dir with them")
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.mixed_precision,
            log_with=names or None,
            project_dir=None if output_dir is None else str(output_dir),
        )
    except ValueError as error:
        raise ConfigError(f"accelerate refuses the settings: {error}") from error
    missing = set(names) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    if missing:
        raise ConfigError(f"tracker {min(missing)!r} is not installed")
    return accelerator


def adapted(model: PreTrainedModel, lora: LoraSettings | None) -> Any:
    """``model`` with a fresh adapter in its layers, or as it is.

    peft puts its layers into ``model`` itself, so an engine over ``model`` runs them, too, from its
    next ``update_weights`` on; until then they change nothing.
    """
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def check_device(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raise ``ConfigError`` for a model that is elsewhere.

    It is not moved: an engine over it has its cache where it was.
    """
    found, wanted = model.device, accelerator.device
    same_place = wanted.index is None or found.index is None or found.index == wanted.index
    if found.type != wanted.type or not same_place:
        raise ConfigError(f"the model is on {found}, expected {wanted} before an engine is made")


def enable_checkpointing(model: Any) -> None:
    """Layers are computed again in the backward pass rather than kept."""
    # The older name warns in transformers 5.23; 5.10 has no other.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def sharded(
    model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[Any, torch.optim.Optimizer]:
    """Over the ranks, where accelerate was told to use FSDP2; otherwise as they are.

    Without it every rank has the whole model, and nothing of accelerate's is put around it: the
    engine runs the very same modules.
    """
    if not accelerator.is_fsdp2:
        return model, optimizer
    model, wrapped = accelerator.prepare(model, optimizer)
    return model, wrapped.optimizer


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, from all ranks; any other as it is."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def copy_weights(source: Any, target: torch.nn.Module) -> None:
    """All parameters of ``source``, which may be sharded, into those of the same name."""
    for name, parameter in source.named_parameters():
        target.get_parameter(name).copy_(whole(parameter))
