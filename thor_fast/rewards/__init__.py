"""Scores of finished trajectories.

For answers in mathematics: ``MathAnswerReward(renderer, verifier)`` inside
``with MathVerifier() as verifier``. Without a verifier, answers are compared exactly, as numbers or
as text: all that integers and fractions need, and nothing to install.
"""

from thor_fast.rewards.base import RewardFunction
from thor_fast.rewards.exact import answers_match
from thor_fast.rewards.math_answer import MathAnswerReward
from thor_fast.rewards.math_verifier import MathVerifier

__all__ = ["MathAnswerReward", "MathVerifier", "RewardFunction", "answers_match"]
