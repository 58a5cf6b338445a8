"""What a run tells while it trains: a JSON line per step, accelerate's trackers, the terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress, TaskID

__all__ = ["METRICS_FILE", "MetricsLog", "flat"]

METRICS_FILE = "metrics.jsonl"
_SCHEMA_VERSION = 1
_SHOWN = ("reward", "call_success", "loss", "grad_norm", "step_s")


class MetricsLog:
    """``log`` a step's numbers: appended to ``metrics.jsonl``, given to the trackers, shown.

    ``done``: steps that are not run again; what a run that was cut off wrote of later ones is
    removed. A terminal gets a bar, anything else a line per step.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path | None, *, config: Any, done: int
    ) -> None:
        self._accelerator, self._steps = accelerator, config.steps
        self._file: TextIO | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._console = Console(stderr=True, soft_wrap=True)
        if accelerator.log_with:
            accelerator.init_trackers(
                "thor_fast",
                config=flat(config),
                init_kwargs={"tensorboard": {"purge_step": done + 1}},
            )
        if not accelerator.is_main_process:
            return
        if folder is not None:
            path = folder / METRICS_FILE
            _keep_steps(path, done)
            self._file = path.open("a", encoding="utf-8")
        if self._console.is_terminal:
            self._bar = Progress(console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("steps", total=self._steps, completed=done)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of step ``step``, counted from 1."""
        self._accelerator.log(metrics, step=step)
        if not self._accelerator.is_main_process:
            return
        if self._file is not None:
            record = {"schema_version": _SCHEMA_VERSION, "step": step, **metrics}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        values = "  ".join(f"{n} {metrics[n]:.4g}" for n in _SHOWN if n in metrics)
        if self._bar is None:
            self._console.print(f"step {step}/{self._steps}  {values}", highlight=False)
        else:
            self._bar.update(self._task, completed=step, description=values)

    def close(self) -> None:
        """Give the trackers and the terminal back."""
        # Not end_training(): it would take the process group from whoever else uses it.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()


def flat(config: Any) -> dict[str, Any]:
    """A dataclass's fields by dotted name, as trackers and comparisons want them."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{f.name}.{name}": part for name, part in flat(value).items()}
        else:
            found[f.name] = value
    return found


def _keep_steps(path: Path, done: int) -> None:
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    # The last line may be half of one.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    draft = path.with_suffix(".partial")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)
