"""Token algebra: ids, mask and log-probs stay together through append and truncate."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast import types
from thor_fast.errors import DataError
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

MODEL, TOOL = TokenSource.MODEL, TokenSource.TOOL
TOKENS = st.lists(st.integers(0, 999), max_size=5).map(tuple)
SEGMENTS = st.lists(st.tuples(st.sampled_from([MODEL, TOOL]), TOKENS), max_size=8)


def build(prompt: tuple[int, ...], parts) -> tuple[Trajectory, list[tuple[int, int, float]]]:
    """A trajectory, and (id, mask, log-prob) of each of its tokens, kept apart by hand."""
    trajectory = Trajectory(prompt)
    rows = [(t, 0, 0.0) for t in prompt]
    for source, ids in parts:
        logprobs = tuple(-0.5 - len(rows) - i for i in range(len(ids)))
        trajectory.append(Segment(source, ids, logprobs if source is MODEL else None))
        model = source is MODEL
        rows += [(t, int(model), p * model) for t, p in zip(ids, logprobs, strict=True)]
    return trajectory, rows


def check(trajectory: Trajectory, rows: list[tuple[int, int, float]]) -> None:
    assert len(trajectory) == len(rows)
    assert trajectory.token_ids == [r[0] for r in rows]
    assert trajectory.loss_mask.tolist() == [r[1] for r in rows]
    assert trajectory.sampling_logprobs.tolist() == [r[2] for r in rows]
    assert trajectory.loss_mask.dtype == np.int8
    assert trajectory.sampling_logprobs.dtype == np.float64


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(types)
    assert result.failed == 0
    assert result.attempted >= 10


@given(TOKENS, SEGMENTS)
def test_append_keeps_everything_aligned(prompt, parts) -> None:
    trajectory, rows = build(prompt, parts)
    check(trajectory, rows)
    sources = [s.source for s in trajectory.segments]
    assert all(a is not b for a, b in itertools.pairwise(sources))
    assert all(len(s) for s in trajectory.segments)


@given(TOKENS, SEGMENTS, st.data())
def test_truncate_rewinds_everything_together(prompt, parts, data) -> None:
    trajectory, rows = build(prompt, parts)
    length = data.draw(st.integers(len(prompt), len(rows)))
    trajectory.stop_reason = StopReason.EOS
    trajectory.truncate(length)
    check(trajectory, rows[:length])
    assert trajectory.stop_reason is None
    trajectory.append(Segment(MODEL, (7,), (-9.0,)))
    check(trajectory, [*rows[:length], (7, 1, -9.0)])


def test_truncate_drops_calls_that_no_longer_fit() -> None:
    trajectory, _ = build((1,), [(MODEL, (1, 2, 3, 4))])
    trajectory.tool_calls = [ToolCall("a", 1, 3), ToolCall("b", 3, 5)]
    trajectory.truncate(4)
    assert [c.code for c in trajectory.tool_calls] == ["a"]


def test_seeds_take_over_from_each_other_and_go_with_their_tokens() -> None:
    trajectory, _ = build((1,), [(MODEL, (1, 2, 3, 4))])
    trajectory.seed, trajectory.reseeded = 7, [(2, 8), (4, 9)]
    assert [trajectory.seed_at(p) for p in range(6)] == [7, 7, 8, 8, 9, 9]
    trajectory.truncate(4)
    assert [trajectory.seed_at(p) for p in range(6)] == [7, 7, 8, 8, 8, 8]
    trajectory.truncate(2)
    assert trajectory.reseeded == []


@pytest.mark.parametrize("length", [0, 4])
def test_truncate_out_of_range(length: int) -> None:
    trajectory, _ = build((1,), [(TOOL, (2, 3))])
    with pytest.raises(DataError, match=f"truncate to {length} tokens, expected 1 .* to 3"):
        trajectory.truncate(length)


def test_segments_have_log_probs_iff_sampled() -> None:
    with pytest.raises(DataError, match="MODEL segment has None log-probs, expected 2"):
        Segment(MODEL, (1, 2))
    with pytest.raises(DataError, match="MODEL segment has 1 log-probs, expected 2"):
        Segment(MODEL, (1, 2), (-0.1,))
    with pytest.raises(DataError, match="TOOL segment has log-probs, expected None"):
        Segment(TOOL, (1,), (-0.1,))


@pytest.mark.parametrize("status", Status)
def test_only_ok_passes_and_only_infra_is_unknown(status: Status) -> None:
    passed = ExecutionResult(status).passed
    assert passed is (None if status is Status.INFRA else status is Status.OK)
    assert ToolCall("x", 0, 1, ExecutionResult(status)).passed is passed


def test_a_call_that_never_ran_is_unknown() -> None:
    assert ToolCall("x", 0, 1).passed is None


def test_infrastructure_endings() -> None:
    assert {s for s in StopReason if s.is_infrastructure} == {
        StopReason.TOOL_FAILURE,
        StopReason.ENGINE_FAILURE,
        StopReason.CANCELLED,
    }


def test_group_rewards_keep_not_scored_apart_from_zero() -> None:
    scored, unscored = Trajectory((1,), reward=0.0), Trajectory((1,))
    assert RolloutGroup((1,), [scored, unscored]).rewards == [0.0, None]


def test_step_group() -> None:
    parent, _ = build((1, 2), [(MODEL, (3, 4))])
    ran = [Status.OK, Status.ERROR, Status.INFRA]
    children = [Trajectory((1, 2, 3)) for _ in range(5)]
    for child, status in zip(children, ran, strict=False):
        child.tool_calls = [ToolCall("x", 3, 4, ExecutionResult(status))]
    children[4].stop_reason = StopReason.ENGINE_FAILURE  # before it could write a call
    assert StepGroup(parent, 0, (1, 2, 3), children).rewards == [1.0, 0.0, None, 0.0, None]
    with pytest.raises(DataError, match="prefix of 3 tokens is not a prefix of the parent's"):
        StepGroup(parent, 0, (1, 2, 9), [])
