"""One answer out of the samples of a prompt: the one most of them give, or whose code ran best.

Both look at a finished :class:`~thor_fast.types.RolloutGroup`, so they work on whatever sampled it.
They combine: ``majority_vote(group, answer, among=highest_pass_rate(group).tied)`` lets only those
vote whose calls failed least. What the infrastructure spoilt takes no part. A tie is said to be
one, and goes to the earliest sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thor_fast.rewards.math_answer import answers_match
from thor_fast.types import RolloutGroup, Trajectory

__all__ = ["Selection", "Vote", "highest_pass_rate", "majority_vote", "pass_rate"]


@dataclass(frozen=True, slots=True)
class Vote:
    """``answer``: in the words of ``sample``, the first to give it; ``None`` both if nobody has.

    ``votes``: how many gave it; ``voters``: how many gave any. ``tied``: the samples, in order,
    each the first to give one of the answers with that many votes; more than one is a tie.
    """

    answer: str | None
    sample: int | None
    votes: int
    voters: int
    tied: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """``sample``: the first of ``tied``, all of which have ``pass_rate``, the highest there is.

    ``None`` and empty where no sample has a call that ran.
    """

    sample: int | None
    pass_rate: float | None
    tied: tuple[int, ...]


def majority_vote(
    group: RolloutGroup,
    answer: Callable[[Trajectory], str | None],
    *,
    equal: Callable[[str, str], bool | None] = answers_match,
    among: Sequence[int] | None = None,
) -> Vote:
    r"""The answer most samples give.

    ``answer``: what a trajectory answers, ``None`` for nothing, which is no vote; for boxed ones
    ``lambda t: last_boxed(renderer.answer(t))``. ``equal``: whether two answers are one, for
    sure; an answer counts for the first class whose first member it equals. ``among``: the samples
    that may vote.
    """
    classes: list[tuple[int, str, int]] = []  # first sample, its words, votes
    for sample, trajectory in enumerate(group.trajectories):
        if not _counts(trajectory) or (among is not None and sample not in among):
            continue
        given = answer(trajectory)
        if given is None:
            continue
        for index, (first, words, votes) in enumerate(classes):
            if equal(given, words):
                classes[index] = (first, words, votes + 1)
                break
        else:
            classes.append((sample, given, 1))
    if not classes:
        return Vote(None, None, 0, 0, ())
    most = max(votes for _, _, votes in classes)
    winners = [(first, words) for first, words, votes in classes if votes == most]
    sample, words = winners[0]
    voters = sum(votes for _, _, votes in classes)
    return Vote(words, sample, most, voters, tuple(first for first, _ in winners))


def pass_rate(trajectory: Trajectory) -> float | None:
    """Of its calls that ran, the part that passed; ``None`` without one.

    A call that self-correction has taken back is not in the trajectory and does not count.
    """
    known = [c.passed for c in trajectory.tool_calls if c.passed is not None]
    return sum(known) / len(known) if known else None


def highest_pass_rate(group: RolloutGroup) -> Selection:
    """The sample whose code ran best. One without a call that ran is not in question: that none of
    its calls failed says nothing.
    """
    rates = {
        sample: rate
        for sample, trajectory in enumerate(group.trajectories)
        if _counts(trajectory) and (rate := pass_rate(trajectory)) is not None
    }
    if not rates:
        return Selection(None, None, ())
    highest = max(rates.values())
    tied = tuple(sample for sample, rate in rates.items() if rate == highest)
    return Selection(tied[0], highest, tied)


def _counts(trajectory: Trajectory) -> bool:
    stop = trajectory.stop_reason
    return stop is not None and not stop.is_infrastructure
