"""The sandbox benchmark as a picture: speed relative to a plain subprocess."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox_peers.registry import BASELINE, NAMES

__all__ = ["plot"]


def _label(name: str) -> str:
    """Nobody is to take an unsafe backend for a peer."""
    safety = "no isolation between snippets"
    return f"{name} ({safety})" if safety in NAMES[name] else name


def plot(path: Path, metrics: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Write a PNG; what to tell the user about it. Needs matplotlib, which is optional."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    names = [name for name in next(iter(metrics.values())) if name != BASELINE]
    keys = list(metrics)
    figure = Figure(figsize=(1.5 + 1.3 * len(keys), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(keys))]
        # Who fails fast is not fast: no bar.
        runs = [metrics[key][name] for key in keys]
        speeds = [math.nan if run["wrong"] else run["ratio"] for run in runs]
        bars = axes.bar(places, speeds, width, label=_label(name))
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(keys)), keys, rotation=20, ha="right")
    axes.set_ylabel("executions/s, plain subprocess = 1")
    axes.set_title(title, fontsize=9)
    if names:
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"plot: {path}"
