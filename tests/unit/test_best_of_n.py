"""Votes and selections: what counts, what does not, and that a tie is called one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.inference.best_of_n import Selection, Vote, highest_pass_rate, majority_vote
from thor_fast.types import (
    ExecutionResult,
    RolloutGroup,
    Status,
    StopReason,
    ToolCall,
    Trajectory,
)

RAN = {
    "+": ExecutionResult(Status.OK),
    "-": ExecutionResult(Status.ERROR),
    "0": ExecutionResult(Status.INFRA),
    ".": None,
}


def group(*samples: str | tuple[str, StopReason]) -> RolloutGroup:
    """A sample is its answer, in ``Trajectory.error`` where ``answer`` finds it."""
    trajectories = []
    for sample in samples:
        text, stop = sample if isinstance(sample, tuple) else (sample, StopReason.EOS)
        trajectories.append(Trajectory((1,), error=text, stop_reason=stop))
    return RolloutGroup((1,), trajectories)


def answer(trajectory: Trajectory) -> str | None:
    return trajectory.error or None


def with_calls(*outcomes: str) -> RolloutGroup:
    made = group(*["x"] * len(outcomes))
    for trajectory, outcome in zip(made.trajectories, outcomes, strict=True):
        trajectory.tool_calls = [ToolCall("x", 0, 1, RAN[letter]) for letter in outcome]
    return made


def test_the_answer_most_give_wins_whatever_its_spelling() -> None:
    vote = majority_vote(group("7", "0.5", "1/2", "", r"\frac{1}{2}"), answer)
    assert vote == Vote("0.5", 1, votes=3, voters=4, tied=(1,))


def test_a_tie_is_called_one_and_goes_to_the_earliest() -> None:
    vote = majority_vote(group("9", "7", "8", "8.0", "7"), answer)
    assert vote == Vote("7", 1, votes=2, voters=5, tied=(1, 2))


def test_nobody_has_an_answer() -> None:
    assert majority_vote(group("", ""), answer) == Vote(None, None, 0, 0, ())
    assert majority_vote(group(), answer) == Vote(None, None, 0, 0, ())


@pytest.mark.parametrize("stop", [s for s in StopReason if s.is_infrastructure])
def test_what_the_infrastructure_spoilt_has_no_vote(stop) -> None:
    made = group(("7", stop), ("7", stop), "8")
    assert majority_vote(made, answer) == Vote("8", 2, 1, 1, (2,))
    for trajectory in made.trajectories:
        trajectory.tool_calls = [ToolCall("x", 0, 1, RAN["+"])]
    assert highest_pass_rate(made) == Selection(2, 1.0, (2,))


def test_only_some_may_vote() -> None:
    made = group("7", "7", "8")
    assert majority_vote(made, answer, among=(1, 2)) == Vote("7", 1, 1, 2, (1, 2))
    assert majority_vote(made, answer, among=(2,)).answer == "8"
    assert majority_vote(made, answer, among=()).answer is None


def test_another_equality() -> None:
    vote = majority_vote(group("a", "B", "b"), answer, equal=lambda x, y: x.lower() == y.lower())
    assert vote == Vote("B", 1, 2, 3, (1,))


def test_the_highest_pass_rate() -> None:
    assert highest_pass_rate(with_calls("+-", "++-", "-", "++-")) == Selection(1, 2 / 3, (1, 3))
    # What did not run, or by our fault, is no failure; and no call is no success.
    assert highest_pass_rate(with_calls("", "0", ".", "+0.-")) == Selection(3, 0.5, (3,))
    assert highest_pass_rate(with_calls("", "0")) == Selection(None, None, ())
    assert highest_pass_rate(with_calls("-", "--")) == Selection(0, 0.0, (0, 1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["", "1", "1.0", "2", "4/2", "x"]), max_size=9), st.randoms())
def test_a_vote_counts_every_answer_once(answers, rng) -> None:
    vote = majority_vote(group(*answers), answer)
    value = {"1": 1, "1.0": 1, "2": 2, "4/2": 2, "x": 3}
    counts = [sum(value.get(a) == k for a in answers) for k in (1, 2, 3)]
    assert vote.voters == sum(counts)
    assert vote.votes == max(counts)
    assert len(vote.tied) == (counts.count(max(counts)) if vote.voters else 0)
    assert list(vote.tied) == sorted(vote.tied)
    if vote.sample is not None:
        assert answers[vote.sample] == vote.answer
        assert vote.sample == vote.tied[0]
    turned = answers[:]
    rng.shuffle(turned)
    again = majority_vote(group(*turned), answer)
    assert (again.votes, again.voters, len(again.tied)) == (vote.votes, vote.voters, len(vote.tied))
