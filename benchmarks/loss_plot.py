"""The loss benchmark as a picture: each backend's share of the GEMMs' floor, and its memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(path: Path, metrics: Mapping[str, Any], title: str) -> str:
    """Write a PNG; what to tell the user about it. Needs matplotlib, which is optional."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    names = list(dict.fromkeys(name for run in metrics.values() for name in run["backends"]))
    measured = any(
        summary.get("extra_bytes")
        for run in metrics.values()
        for summary in run["backends"].values()
    )
    # Memory is CUDA's allocator's to tell; on a CPU there is nothing to show.
    panels = {"share_of_floor": (100, "% of the GEMMs' rate")}
    if measured:
        panels["extra_bytes"] = (1e-9, "peak extra memory, GB")
    figure = Figure(figsize=(4 + 1.6 * len(metrics), 1 + 3 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / max(1, len(names))
    for axes, (quantity, (factor, label)) in zip(all_axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(metrics))]
            # Who is wrong or ran out of memory has no bar.
            values = [run["backends"].get(name, {}).get(quantity) for run in metrics.values()]
            heights = [math.nan if v is None else factor * v for v in values]
            axes.bar(places, heights, width, label=name)
        axes.set_ylabel(label)
    all_axes[0].axhline(100, color="black", linewidth=0.8)
    all_axes[0].set_title(title, fontsize=9)
    all_axes[-1].set_xticks(range(len(metrics)), list(metrics), rotation=20, ha="right")
    all_axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"plot: {path}"
