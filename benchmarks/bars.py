"""Grouped bars as a PNG, for any benchmark. Needs matplotlib, which is optional."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["NO_MATPLOTLIB", "figure_of", "group", "save"]

NO_MATPLOTLIB = "no plot: matplotlib is not installed (pip install matplotlib)"


def figure_of(width: float, height: float) -> Any:
    """A figure of so many inches; ``None`` where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def group(axes: Any, heights: Mapping[str, Sequence[float | None]]) -> list[Any]:
    """One series for each name, side by side at 0, 1, ...; no bar where there is no number."""
    width = 0.8 / max(1, len(heights))
    series = []
    for i, (name, values) in enumerate(heights.items()):
        places = [x + (i - (len(heights) - 1) / 2) * width for x in range(len(values))]
        shown = [math.nan if value is None else value for value in values]
        series.append(axes.bar(places, shown, width, label=name))
    return series


def save(figure: Any, path: Path) -> str:
    """Write it; what to tell the user about it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"plot: {path}"
