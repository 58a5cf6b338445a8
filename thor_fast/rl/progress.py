"""What a run tells while it trains: a JSON line per step, accelerate's trackers, the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator  # type: ignore[import-untyped]
from rich.console import Console

from thor_fast.types import RolloutGroup, Trajectory

__all__ = ["MetricsLog", "rollout_metrics"]

_SCHEMA_VERSION = 1
METRICS_FILE = "metrics.jsonl"


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of everything that was rolled out in a step, whether trained on or not.

    ``reward``: mean over the scored. ``unscored``: how many were not. ``call_success``: share of
    the calls that ran; ``first_call_success``: of the episodes' first ones. A mean over nothing is
    left out.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    calls = [c.passed for t in trajectories for c in t.tool_calls if c.passed is not None]
    firsts = [_first_passed(t) for t in trajectories]
    means: dict[str, Sequence[float | None]] = {
        "reward": [t.reward for t in trajectories],
        "call_success": calls,
        "first_call_success": firsts,
        "response_tokens": [len(t) - len(t.prompt_ids) for t in trajectories],
        "calls": [len(t.tool_calls) for t in trajectories],
    }
    found = {
        "trajectories": float(len(trajectories)),
        "unscored": float(sum(t.reward is None for t in trajectories)),
    }
    for name, values in means.items():
        known = [float(v) for v in values if v is not None]
        if known:
            found[name] = sum(known) / len(known)
    return found


def _first_passed(trajectory: Trajectory) -> bool | None:
    return trajectory.tool_calls[0].passed if trajectory.tool_calls else None


class MetricsLog:
    """``log`` a step's numbers: appended to ``metrics.jsonl`` in ``folder``, given to the trackers,
    printed.
    """

    def __init__(self, accelerator: Accelerator, folder: Path | None, steps: int) -> None:
        self._accelerator, self._steps = accelerator, steps
        self._console = Console(stderr=True)
        self._file: TextIO | None = None
        if folder is not None and accelerator.is_main_process:
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of step ``step``, counted from 1."""
        if not self._accelerator.is_main_process:
            return
        if self._file is not None:
            record = {"schema_version": _SCHEMA_VERSION, "step": step, **metrics}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        shown = ("reward", "call_success", "loss", "grad_norm", "step_s")
        values = "  ".join(f"{n} {metrics[n]:.4g}" for n in shown if n in metrics)
        self._console.print(f"step {step}/{self._steps}  {values}", highlight=False)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
