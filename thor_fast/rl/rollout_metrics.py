"""Numbers of a step's rollouts, from rows that ranks can exchange."""

from __future__ import annotations

from collections.abc import Sequence

from thor_fast.types import RolloutGroup, StepGroup, Trajectory

__all__ = ["branch_metrics", "episode_rows", "rollout_metrics", "step_rows"]

Row = dict[str, float | None]


def episode_rows(groups: Sequence[RolloutGroup]) -> list[Row]:
    """What :func:`rollout_metrics` averages, of each trajectory."""
    return [_row(t) for group in groups for t in group.trajectories]


def _row(trajectory: Trajectory) -> Row:
    passed = [call.passed for call in trajectory.tool_calls]
    return {
        "reward": trajectory.reward,
        "calls": float(len(passed)),
        "calls_run": float(sum(p is not None for p in passed)),
        "calls_passed": float(sum(p is True for p in passed)),
        "first_call_success": None if not passed or passed[0] is None else float(passed[0]),
        "response_tokens": float(len(trajectory) - len(trajectory.prompt_ids)),
    }


def rollout_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Of everything that was rolled out in a step, whether trained on or not.

    ``reward``: mean over the scored; ``unscored``: how many were not. ``call_success``: share of
    the calls that ran; ``first_call_success``: of the episodes' first ones. A mean over nothing is
    left out.
    """
    found = {
        "trajectories": float(len(rows)),
        "unscored": float(sum(row["reward"] is None for row in rows)),
    }
    for name in ("reward", "first_call_success", "response_tokens", "calls"):
        known = [v for row in rows if (v := row[name]) is not None]
        if known:
            found[name] = sum(known) / len(known)
    ran = sum(row["calls_run"] or 0.0 for row in rows)
    if ran:
        found["call_success"] = sum(row["calls_passed"] or 0.0 for row in rows) / ran
    return found


def step_rows(groups: Sequence[StepGroup]) -> list[list[float | None]]:
    """What :func:`branch_metrics` averages: of each step group whether continuations passed."""
    return [group.rewards for group in groups]


def branch_metrics(rows: Sequence[list[float | None]]) -> dict[str, float]:
    """``step_groups``: how many failed calls were sampled again; ``step_success``: share of the
    continuations that passed; ``step_informative``: share of the groups in which some, not all did.
    """
    if not rows:
        return {}
    known = [[score for score in row if score is not None] for row in rows]
    scores = [score for row in known for score in row]
    found = {
        "step_groups": float(len(rows)),
        "step_informative": sum(len(set(row)) > 1 for row in known) / len(rows),
    }
    if scores:
        found["step_success"] = sum(scores) / len(scores)
    return found
