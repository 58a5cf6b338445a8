"""The sandbox benchmark as a picture: speed relative to a plain subprocess."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bars import NO_MATPLOTLIB, figure_of, group, save
from sandbox_peers.registry import BASELINE, NAMES

__all__ = ["plot"]


def _label(name: str) -> str:
    """Nobody is to take an unsafe backend for a peer."""
    safety = "no isolation between snippets"
    return f"{name} ({safety})" if safety in NAMES[name] else name


def plot(path: Path, metrics: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Write a PNG; what to tell the user about it. Needs matplotlib, which is optional."""
    names = [name for name in next(iter(metrics.values())) if name != BASELINE]
    keys = list(metrics)
    figure = figure_of(1.5 + 1.3 * len(keys), 4.5)
    if figure is None:
        return NO_MATPLOTLIB
    axes = figure.subplots()
    runs = {_label(name): [metrics[key][name] for key in keys] for name in names}
    # Who fails fast is not fast: no bar.
    speeds = {n: [None if r["wrong"] else r["ratio"] for r in rs] for n, rs in runs.items()}
    for bars in group(axes, speeds):
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(keys)), keys, rotation=20, ha="right")
    axes.set_ylabel("executions/s, plain subprocess = 1")
    axes.set_title(title, fontsize=9)
    if names:
        axes.legend(fontsize=8)
    return save(figure, path)
