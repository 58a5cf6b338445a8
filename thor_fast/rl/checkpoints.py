"""Checkpoints: a folder that is there whole, or not at all.

::

    checkpoints/step-000012/      renamed to this name when all of it is on the disk
        model/                    the weights, or the adapter: what transformers or peft load
        training.pt               optimizer, schedule, the random states of each process
        progress.json             where the run is, see ``Progress``
        config.toml               what it was told

A process killed while it writes leaves ``.step-000012.partial``, which is nobody's checkpoint and
goes when the next one is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thor_fast.errors import DataError

__all__ = ["Progress", "newest", "random_states", "read_progress", "restore_random", "write"]

_SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{6,})")
_TRAINING, _PROGRESS, _CONFIG = "training.pt", "progress.json", "config.toml"


@dataclass(frozen=True, slots=True)
class Progress:
    """``step``: steps done. ``position``: prompts used, an index into the endless order of them.
    ``weight_version``: of the engine. ``processes``: that trained, each with random states.
    """

    step: int
    position: int
    weight_version: int
    skipped_steps: int
    processes: int
    metrics: dict[str, float]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, if there is any."""
    found = {int(m[1]): p for p in _entries(folder) if (m := _NAME.fullmatch(p.name))}
    return found[max(found)] if found else None


def write(
    folder: Path,
    progress: Progress,
    *,
    config: str,
    training: dict[str, Any],
    save_model: Any,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``; returns its path.

    ``save_model(path)`` writes the weights into a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in _entries(folder):
        if path.name.endswith(".partial"):
            shutil.rmtree(path)
    final = folder / f"step-{progress.step:06d}"
    partial = folder / f".{final.name}.partial"
    partial.mkdir()
    save_model(partial / "model")
    torch.save(training, partial / _TRAINING)
    record = {"schema_version": _SCHEMA_VERSION, **dataclasses.asdict(progress)}
    (partial / _PROGRESS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (partial / _CONFIG).write_text(config, encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    partial.rename(final)
    _flush(folder)
    steps = sorted(p for p in _entries(folder) if _NAME.fullmatch(p.name))
    for path in steps[:-keep]:
        shutil.rmtree(path)
    return final


def read_progress(path: Path) -> Progress:
    """Of the checkpoint at ``path``. ``DataError`` where it is of another version or damaged."""
    try:
        record = json.loads((path / _PROGRESS).read_text("utf-8"))
        version = record.pop("schema_version")
        if version != _SCHEMA_VERSION:
            raise DataError(f"{path} has schema_version {version}, expected {_SCHEMA_VERSION}")
        return Progress(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the checkpoint {path}: {error}") from error


def read_training(path: Path) -> dict[str, Any]:
    """Optimizer, schedule and random states."""
    # Our own file, with numpy's and Python's random states in it.
    training: dict[str, Any] = torch.load(path / _TRAINING, map_location="cpu", weights_only=False)
    return training


def random_states() -> dict[str, Any]:
    """Of Python, numpy and torch, on the CPU and all GPUs this process sees."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - what libraries draw from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore_random(states: dict[str, Any]) -> None:
    """The reverse of :func:`random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _flush(path: Path) -> None:
    """To the disk: a rename must not get there before what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
