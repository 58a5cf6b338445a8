"""Metrics of micro-batches and of updates, put together (see ``kernels.Metrics.wait``)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["averaged", "merged"]

_LEVELS = ("episode", "step")
_SUMS = ("tokens", "loss", "policy_loss", "nll", "kl_loss")


def merged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the micro-batches of one update, on all ranks: parts of the loss are added, all else is
    the mean over the rows read. ``loss`` is the whole. A level without a row is left out.

    >>> parts = [{"episode/tokens": 1.0, "episode/loss": 2.0, "episode/ratio": 4.0},
    ...          {"episode/tokens": 3.0, "episode/loss": 1.0, "episode/ratio": 0.0}]
    >>> merged(parts)
    {'loss': 3.0, 'episode/tokens': 4.0, 'episode/loss': 3.0, 'episode/ratio': 1.0}
    """
    found = {"loss": sum(part.get(f"{level}/loss", 0.0) for part in parts for level in _LEVELS)}
    for level in _LEVELS:
        rows = [part.get(f"{level}/tokens", 0.0) for part in parts]
        for key in parts[0] if sum(rows) else ():
            prefix, _, name = key.partition("/")
            if prefix == level:
                weights = [1.0] * len(parts) if name in _SUMS else [r / sum(rows) for r in rows]
                pairs = zip(parts, weights, strict=True)
                found[key] = sum(part[key] * weight for part, weight in pairs)
    return found


def averaged(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over a step's updates of what each of them has, and ``updates``, their number."""
    names = {name: None for update in updates for name in update}  # a set that keeps the order
    found = {"updates": float(len(updates))}
    for name in names:
        values = [update[name] for update in updates if name in update]
        found[name] = sum(values) / len(values)
    return found
