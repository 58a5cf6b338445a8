"""Held out, near: pairs of jobs the policy knows one by one, but was never shown together."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.families.chain import HELD_OUT_PAIRS, two_steps
from thor_fast.synthetic.problem import Problem

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """One of the three pairs that :mod:`.chain` leaves out."""
    return two_steps(rng, *rng.choice(HELD_OUT_PAIRS))
