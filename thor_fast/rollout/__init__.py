"""Episodes: one (:func:`run_episode`) or many at once (:class:`RolloutScheduler`)."""

from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.loop import run_episode
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Finished, Prompt, RolloutScheduler
from thor_fast.rollout.splice import ObservationEncoder

__all__ = [
    "Finished",
    "ObservationEncoder",
    "Prompt",
    "Renderer",
    "RolloutLimits",
    "RolloutScheduler",
    "run_episode",
]
