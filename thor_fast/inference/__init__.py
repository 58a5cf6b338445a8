"""Spending more computation on one answer: retries of failed calls, and the best of several."""

from thor_fast.inference.best_of_n import Selection, Vote, highest_pass_rate, majority_vote
from thor_fast.inference.self_correct import CorrectionCounts, count_corrections, self_correct

__all__ = [
    "CorrectionCounts",
    "Selection",
    "Vote",
    "count_corrections",
    "highest_pass_rate",
    "majority_vote",
    "self_correct",
]
