"""Scores of finished trajectories."""

from thor_fast.rewards.base import RewardFunction
from thor_fast.rewards.math_answer import MathAnswerReward

__all__ = ["MathAnswerReward", "RewardFunction"]
