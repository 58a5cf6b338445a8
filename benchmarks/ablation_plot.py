"""The ablation's learning curves as a picture: answers and calls over steps and over tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bars import NO_MATPLOTLIB, figure_of, save

__all__ = ["plot"]

Point = Mapping[str, Any]
_PANELS = (
    ("step", "accuracy", "updates", "answers that are right"),
    ("step", "call_success", "updates", "calls that succeed"),
    ("rollout_tokens", "accuracy", "tokens sampled for training", "answers that are right"),
    ("rollout_tokens", "call_success", "tokens sampled for training", "calls that succeed"),
)


def plot(path: Path, curves: Mapping[str, Sequence[Sequence[Point]]], title: str) -> str:
    """Write a PNG; what to tell the user about it. Needs matplotlib, which is optional.

    ``curves``: by arm, the points of each seed, all at the same steps.
    """
    figure = figure_of(11, 8)
    if figure is None:
        return NO_MATPLOTLIB
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for i, (name, seeds) in enumerate(curves.items()):
            _draw(axes, seeds, x, y, name, f"C{i}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _draw(
    axes: Any, seeds: Sequence[Sequence[Point]], x: str, y: str, name: str, color: str
) -> None:
    """Each seed thin, their mean thick. An arm without calls has no curve of them."""
    known = [[p for p in points if p[y] is not None] for points in seeds]
    for points in known:
        axes.plot([p[x] for p in points], [p[y] for p in points], color=color, alpha=0.3, lw=0.8)
    means = [
        (statistics.mean(p[x] for p in same), statistics.mean(p[y] for p in same))
        for same in zip(*known, strict=True)
    ]
    if means:
        axes.plot(*zip(*means, strict=True), color=color, lw=2, marker=".", label=name)
