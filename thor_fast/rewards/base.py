"""What a reward is: a number for a trajectory, or ``None`` where there is nothing to score."""

from __future__ import annotations

from typing import Protocol

from thor_fast.types import Trajectory

__all__ = ["RewardFunction"]


class RewardFunction(Protocol):
    """Called once per finished trajectory, off the event loop, so it may take its time."""

    def __call__(self, trajectory: Trajectory, reference: str) -> float | None:
        """The reward; ``None`` = not scored, which is not the same as 0.

        ``reference``: the expected answer, as the task gives it. A trajectory whose
        ``stop_reason.is_infrastructure`` must give ``None``: it says nothing about the model.
        Raises ``RewardError`` for a reference it cannot compare with by design.
        """
        ...
