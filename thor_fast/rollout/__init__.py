"""Episodes: one (:func:`run_episode`) or many at once (:class:`RolloutScheduler`).

Failed calls are sampled again by :func:`branch_failed_steps`, to learn from, or under a
:class:`BacktrackPolicy`, to go on with one that runs.
"""

from thor_fast.rollout.backtrack import BacktrackPolicy
from thor_fast.rollout.branch import BranchPolicy, branch_failed_steps
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.loop import run_episode
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Finished, Prompt, RolloutScheduler
from thor_fast.rollout.splice import ObservationEncoder

__all__ = [
    "BacktrackPolicy",
    "BranchPolicy",
    "Finished",
    "ObservationEncoder",
    "Prompt",
    "Renderer",
    "RolloutLimits",
    "RolloutScheduler",
    "branch_failed_steps",
    "run_episode",
]
