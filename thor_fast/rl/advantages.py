"""Advantages relative to a group, at both levels (THOR, arXiv 2509.13761, section 3.3; GRPO).

An episode is compared with the others of its prompt, by the answer's reward; a re-sampled step with
the others of its prefix, by whether its block passed. Each group has a mean and a standard
deviation of its own, over what was scored in it: ``None`` is left out, and never counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from thor_fast.errors import ConfigError, DataError
from thor_fast.types import RolloutGroup, StepGroup, Trajectory

__all__ = [
    "EPISODE",
    "STEP",
    "AdvantagePolicy",
    "TrainingSequence",
    "group_advantages",
    "hierarchical_advantages",
    "is_informative",
]

EPISODE, STEP = 0, 1

Singleton = Literal["reward", "zero", "drop"]
ZeroVariance = Literal["zero", "drop"]

# Added to the deviation, as in THOR's code and verl's (core_algos.py).
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class AdvantagePolicy:
    """What an advantage is. The defaults are THOR's code.

    ``scale_by_std``: divide by the group's standard deviation (unbiased, n - 1, as ``torch.std``)
    plus 1e-6; otherwise only the mean is taken off (Dr. GRPO).
    ``singleton``, for a group with one score, which has nothing to be compared with: ``reward``:
    the score itself; ``zero``; ``drop``: no sequence.
    ``zero_variance``, for a group whose scores are all the same: ``zero``: its tokens have no
    gradient, but count in the loss's denominators; ``drop``: no sequences.

    Raises:
        ConfigError: a value that is none of these.
    """

    scale_by_std: bool = True
    singleton: Singleton = "reward"
    zero_variance: ZeroVariance = "zero"

    def __post_init__(self) -> None:
        for name, values in (("singleton", Singleton), ("zero_variance", ZeroVariance)):
            found, allowed = getattr(self, name), get_args(values)
            if found not in allowed:
                raise ConfigError(f"{name} is {found!r}, expected one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """A scored trajectory. ``level``: 0 a whole episode, 1 a re-sampled step. ``group`` is the
    number of its group, one count over both levels.

    What of it is trained on is ``trajectory.loss_mask``: a step's prompt is the prefix it was
    re-sampled from, so only tokens sampled anew are, and observations never.
    """

    trajectory: Trajectory
    level: int
    advantage: float
    group: int


def group_advantages(scores: Sequence[float | None], policy: AdvantagePolicy) -> list[float | None]:
    """One per score of a group; ``None`` where there is no score, or the policy drops the group.

    >>> group_advantages([1.0, None, 0.0], AdvantagePolicy(scale_by_std=False))
    [0.5, None, -0.5]
    >>> group_advantages([None, 0.25], AdvantagePolicy())
    [None, 0.25]

    Raises:
        DataError: a score is NaN or infinite.
    """
    known = [score for score in scores if score is not None]
    wrong = [score for score in known if not math.isfinite(score)]
    if wrong:
        raise DataError(f"a score is {wrong[0]}, expected a finite number, or None if not scored")
    if len(known) < 2:
        fixed = {"reward": known[0] if known else None, "zero": 0.0, "drop": None}[policy.singleton]
        return [None if score is None else fixed for score in scores]
    # Compared, not computed: a deviation of rounding errors over 1e-6 would be an advantage.
    if min(known) == max(known):
        fixed = {"zero": 0.0, "drop": None}[policy.zero_variance]
        return [None if score is None else fixed for score in scores]
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if policy.scale_by_std:
        variance = math.fsum((score - mean) ** 2 for score in known) / (len(known) - 1)
        scale = math.sqrt(variance) + _EPSILON
    return [None if score is None else (score - mean) / scale for score in scores]


def is_informative(group: RolloutGroup | StepGroup, policy: AdvantagePolicy) -> bool:
    """Whether somebody in the group has an advantage other than 0: what dynamic sampling keeps.

    So groups with different scores, and singletons whose score is an advantage. THOR keeps a
    singleton of score 0 as well, which has no gradient.
    """
    return any(advantage for advantage in group_advantages(_scores(group), policy))


def hierarchical_advantages(
    groups: Sequence[RolloutGroup],
    step_groups: Sequence[StepGroup],
    policy: AdvantagePolicy,
) -> list[TrainingSequence]:
    """A sequence per scored trajectory: groups in their order, then step groups in theirs.

    What the infrastructure ended is not scored, whatever its reward says.

    Raises:
        DataError: a score is NaN or infinite.
    """
    found = []
    leveled = [(EPISODE, group) for group in groups] + [(STEP, group) for group in step_groups]
    for number, (level, group) in enumerate(leveled):
        advantages = group_advantages(_scores(group), policy)
        for trajectory, advantage in zip(_trajectories(group), advantages, strict=True):
            if advantage is not None:
                found.append(TrainingSequence(trajectory, level, advantage, number))
    return found


def _trajectories(group: RolloutGroup | StepGroup) -> list[Trajectory]:
    return group.trajectories if isinstance(group, RolloutGroup) else group.continuations


def _scores(group: RolloutGroup | StepGroup) -> list[float | None]:
    def ours(trajectory: Trajectory) -> bool:
        return trajectory.stop_reason is not None and trajectory.stop_reason.is_infrastructure

    pairs = zip(_trajectories(group), group.rewards, strict=True)
    return [None if ours(trajectory) else reward for trajectory, reward in pairs]
