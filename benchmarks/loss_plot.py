"""The loss benchmark as a picture: each backend's share of its floor, and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bars import NO_MATPLOTLIB, figure_of, group, save

__all__ = ["plot"]


def plot(path: Path, metrics: Mapping[str, Any], title: str, floor: str) -> str:
    """Write a PNG; what to tell the user about it. ``floor``: what 100 % is."""
    runs = list(metrics.values())
    names = list(dict.fromkeys(name for run in runs for name in run["backends"]))
    measured = any(m.get("extra_bytes") for run in runs for m in run["backends"].values())
    # Memory is CUDA's allocator's to tell; on a CPU there is nothing to show.
    panels = {"share_of_floor": (100, f"% of {floor}")}
    if measured:
        panels["extra_bytes"] = (1e-9, "peak extra memory, GB")
    figure = figure_of(4 + 1.6 * len(metrics), 1 + 3 * len(panels))
    if figure is None:
        return NO_MATPLOTLIB
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (quantity, (factor, label)) in zip(all_axes, panels.items(), strict=True):
        found = {n: [run["backends"].get(n, {}).get(quantity) for run in runs] for n in names}
        # Who is wrong or ran out of memory has no bar.
        group(axes, {n: [None if v is None else factor * v for v in vs] for n, vs in found.items()})
        axes.set_ylabel(label)
    all_axes[0].axhline(100, color="black", linewidth=0.8)
    all_axes[0].set_title(title, fontsize=9)
    all_axes[-1].set_xticks(range(len(metrics)), list(metrics), rotation=20, ha="right")
    all_axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)
