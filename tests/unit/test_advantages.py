"""Group advantages: against numpy, and what is done with groups that compare nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.errors import ConfigError, DataError
from thor_fast.rl import AdvantagePolicy, hierarchical_advantages, is_informative
from thor_fast.rl.advantages import EPISODE, STEP, group_advantages
from thor_fast.types import (
    ExecutionResult,
    RolloutGroup,
    Segment,
    Status,
    StepGroup,
    StopReason,
    TokenSource,
    ToolCall,
    Trajectory,
)

THOR = AdvantagePolicy()
UNSCALED = AdvantagePolicy(scale_by_std=False)


def episode(reward: float | None, stop: StopReason = StopReason.EOS) -> Trajectory:
    segments = [Segment(TokenSource.MODEL, (5, 6), (-0.5, -0.25))]
    return Trajectory((1, 2), segments, reward=reward, stop_reason=stop)


def group(*rewards: float | None) -> RolloutGroup:
    return RolloutGroup((1, 2), [episode(reward) for reward in rewards])


def step_group(*statuses: Status | None) -> StepGroup:
    """``None``: the continuation came to its end without a block."""
    parent = episode(0.0)
    continuations = []
    for status in statuses:
        again = Trajectory((1, 2, 5), stop_reason=StopReason.EOS)
        again.append(Segment(TokenSource.MODEL, (7, 8), (-0.5, -0.5)))
        if status is not None:
            again.tool_calls.append(ToolCall("1", 3, 5, ExecutionResult(status)))
        continuations.append(again)
    return StepGroup(parent, 0, (1, 2, 5), continuations)


scores = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=12)


@given(scores)
def test_against_numpy(values):
    known = np.array([v for v in values if v is not None])
    found = group_advantages(values, THOR)
    assert [a is None for a in found] == [v is None for v in values]
    if len(known) < 2 or np.ptp(known) == 0:
        return
    expected = (known - known.mean()) / (known.std(ddof=1) + 1e-6)
    np.testing.assert_allclose([a for a in found if a is not None], expected, rtol=1e-6, atol=1e-6)
    unscaled = [a for a in group_advantages(values, UNSCALED) if a is not None]
    np.testing.assert_allclose(unscaled, known - known.mean(), rtol=1e-9, atol=1e-9)


@given(scores, st.floats(-5, 5))
def test_what_is_not_scored_changes_nothing(values, value):
    scored = [value, *(v for v in values if v is not None)]
    among = [value, None, *values]
    alone = group_advantages(scored, THOR)
    assert [a for a in group_advantages(among, THOR) if a is not None] == alone


def test_the_deviation_is_unbiased():
    found = group_advantages([1.0, 0.0, 0.0, 0.0], THOR)
    assert found[0] == pytest.approx(0.75 / (0.5 + 1e-6), rel=1e-12)
    assert found[1] == pytest.approx(-0.25 / (0.5 + 1e-6), rel=1e-12)


@pytest.mark.parametrize(("policy", "expected"), [("reward", 0.25), ("zero", 0.0), ("drop", None)])
def test_a_singleton(policy, expected):
    chosen = AdvantagePolicy(singleton=policy)
    assert group_advantages([None, 0.25, None], chosen) == [None, expected, None]
    assert is_informative(group(0.25), chosen) == bool(expected)
    assert not is_informative(group(0.0), chosen)


@pytest.mark.parametrize(("policy", "expected"), [("zero", 0.0), ("drop", None)])
def test_equal_scores(policy, expected):
    """Three times 0.1: the mean is not 0.1, and the rest over 1e-6 would be an advantage."""
    chosen = AdvantagePolicy(zero_variance=policy)
    assert group_advantages([0.1, None, 0.1, 0.1], chosen) == [expected, None, expected, expected]
    assert not is_informative(group(0.1, None, 0.1, 0.1), chosen)


def test_nothing_scored():
    assert group_advantages([], THOR) == []
    assert group_advantages([None, None], THOR) == [None, None]
    assert not is_informative(group(None, None), THOR)
    assert hierarchical_advantages([group(None, None)], [], THOR) == []


def test_levels_and_groups_are_apart():
    groups = [group(1.0, 0.0), group(None), group(0.0, 0.0)]
    steps = [step_group(Status.OK, Status.ERROR, Status.INFRA, None), step_group(Status.OK)]
    found = hierarchical_advantages(groups, steps, UNSCALED)
    third = 1 / 3
    assert [(s.level, s.group, pytest.approx(s.advantage)) for s in found] == [
        (EPISODE, 0, 0.5),
        (EPISODE, 0, -0.5),
        (EPISODE, 2, 0.0),
        (EPISODE, 2, 0.0),
        (STEP, 3, 2 * third),
        (STEP, 3, -third),
        (STEP, 3, -third),
        (STEP, 4, 1.0),
    ]
    assert found[0].trajectory is groups[0].trajectories[0]
    assert found[6].trajectory is steps[0].continuations[3]
    assert is_informative(steps[0], THOR)


@pytest.mark.parametrize("stop", [s for s in StopReason if s.is_infrastructure])
def test_what_the_infrastructure_ended_is_not_scored(stop):
    """Also where no call was made, which else is a continuation that failed."""
    steps = step_group(Status.OK, None, None)
    steps.continuations[2].stop_reason = stop
    found = hierarchical_advantages([], [steps], UNSCALED)
    assert [s.advantage for s in found] == [0.5, -0.5]
    episodes = RolloutGroup((1, 2), [episode(1.0), episode(0.0, stop)])
    assert [s.advantage for s in hierarchical_advantages([episodes], [], UNSCALED)] == [1.0]


def test_settings_and_scores_that_make_no_sense():
    with pytest.raises(ConfigError, match="singleton is 'mean', expected one of reward, zero, dr"):
        AdvantagePolicy(singleton="mean")
    with pytest.raises(ConfigError, match="zero_variance is 'reward', expected one of zero, drop"):
        AdvantagePolicy(zero_variance="reward")
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match="expected a finite number, or None if not scored"):
            group_advantages([0.0, wrong], THOR)
