"""Trajectories on disk come back as they were, and what is not a whole record is named."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import DataError
from thor_fast.rollout.record_fields import read_trajectory, trajectory_fields
from thor_fast.rollout.records import TrajectoryWriter, read_trajectories
from thor_fast.types import (
    Attempt,
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

# Surrogates too, alone and in pairs: what a guest prints is not always text.
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=6)
IDS = st.lists(st.integers(0, 2**31), min_size=1, max_size=4).map(tuple)
FLOATS = st.floats(allow_nan=False)
SEEDS = st.integers(0, 2**64 - 1)
SPANS = st.lists(st.tuples(st.integers(0, 9), SEEDS), max_size=2)
RESULTS = st.builds(
    ExecutionResult,
    status=st.sampled_from(Status),
    stdout=TEXT,
    stderr=TEXT,
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 64),
    wall_s=FLOATS,
    cpu_s=FLOATS,
    peak_memory_bytes=st.integers(0, 2**62),
    truncated=st.booleans(),
    error=TEXT,
    files=st.dictionaries(st.text("ab/", max_size=3), st.binary(max_size=5), max_size=2),
)
CALLS = st.builds(
    ToolCall, TEXT, st.integers(0, 99), st.integers(0, 99), st.none() | RESULTS, TEXT,
    st.integers(0, 4),
)  # fmt: skip


@st.composite
def segments(draw) -> Segment:
    ids = draw(IDS)
    if draw(st.booleans()):
        return Segment(TokenSource.TOOL, ids)
    n = len(ids)
    return Segment(TokenSource.MODEL, ids, tuple(draw(st.lists(FLOATS, min_size=n, max_size=n))))


SEGMENTS = st.lists(segments(), max_size=3)
ATTEMPTS = st.builds(
    Attempt, st.integers(0, 9), SEGMENTS.map(tuple), CALLS, st.integers(0, 3), SPANS.map(tuple),
    st.integers(0, 3),
)  # fmt: skip
TRAJECTORIES = st.builds(
    Trajectory, IDS, SEGMENTS, st.lists(CALLS, max_size=2), st.none() | st.sampled_from(StopReason),
    st.none() | FLOATS, SEEDS, st.integers(0, 9), TEXT,
    st.dictionaries(st.sampled_from(["a", "b"]), FLOATS), SPANS, st.lists(ATTEMPTS, max_size=1),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    trajectories=st.lists(TRAJECTORIES, min_size=1, max_size=2),
    task_id=TEXT,
    cut=st.integers(1, 9),
    continuations=st.lists(TRAJECTORIES, max_size=2),
)
def test_everything_comes_back(tmp_path_factory, trajectories, task_id, cut, continuations) -> None:
    parent = trajectories[-1]
    prefix = tuple(parent.token_ids[:cut])
    for t in continuations:
        t.prompt_ids = prefix
    group = RolloutGroup(parent.prompt_ids, trajectories, task_id)
    steps = [StepGroup(parent, 1, prefix, continuations)]
    path = tmp_path_factory.mktemp("records") / "t.jsonl"
    with TrajectoryWriter(path) as writer:
        writer.write([group, group], steps, step=3, arm="x")
        writer.write([], note=None)
    first, second = read_trajectories(path)
    assert (first.groups, first.step_groups) == ([group, group], steps)
    assert first.step_groups[0].parent is first.groups[1].trajectories[-1]
    assert first.context == {"step": 3, "arm": "x"}
    assert (second.context, second.groups, second.step_groups) == ({"note": None}, [], [])
    path.read_text("utf-8", "strict")


def test_floats_that_json_does_not_know() -> None:
    t = Trajectory((1,), metrics={"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.1 + 0.2})
    back = read_trajectory(json.loads(json.dumps(trajectory_fields(t), allow_nan=False)), (1,))
    assert math.isnan(back.metrics.pop("c"))
    assert back.metrics == {"a": math.inf, "b": -math.inf, "d": 0.1 + 0.2}


def test_no_field_is_left_out() -> None:
    call = ToolCall("x", 0, 1, ExecutionResult(Status.OK))
    segment = Segment(TokenSource.MODEL, (1,), (-1.0,))
    t = Trajectory((1,), [segment], [call], attempts=[Attempt(1, (segment,), call, 0)])
    record = trajectory_fields(t)
    for written, kind in [
        ({"prompt_ids": (), **record}, Trajectory),
        (record["segments"][0], Segment),
        (record["tool_calls"][0], ToolCall),
        (record["tool_calls"][0]["result"], ExecutionResult),
        (record["attempts"][0], Attempt),
    ]:
        assert set(written) == {f.name for f in fields(kind)}


@pytest.fixture
def written(tmp_path):
    """A file of two batches of two groups each, and its lines."""
    path = tmp_path / "t.jsonl"
    groups = [RolloutGroup((1,), [Trajectory((1,))], str(i)) for i in range(2)]
    with TrajectoryWriter(path) as writer:
        writer.write(groups, [StepGroup(groups[1].trajectories[0], 0, (1,), [])])
        writer.write(groups)
    return path, path.read_bytes().splitlines(keepends=True)


def read_until_it_breaks(path) -> tuple[int, str]:
    """How many batches could be read, and what was wrong then."""
    read = []
    with pytest.raises(DataError) as caught:
        read.extend(read_trajectories(path))
    return len(read), str(caught.value)


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_half_written_line_is_named(written, keep) -> None:
    path, lines = written
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    n, message = read_until_it_breaks(path)
    assert n == 1
    assert f"{path}, line 7 is half-written ({len(lines[-1][:keep])} bytes" in message
    assert "the run that wrote it was killed" in message
    with pytest.raises(DataError, match="ends in a half-written line, expected a newline"):
        TrajectoryWriter(path)


@pytest.mark.parametrize(
    ("n_lines", "n_batches", "message"),
    [
        (6, 1, "line 5 has 1 of its 2 group records when it comes to the end of the file"),
        (5, 1, "line 5 has 0 of its 2 group records when it comes to the end of the file"),
        (3, 0, "line 1 has 0 of its 1 step_group records when it comes to the end of the file"),
    ],
)
def test_a_batch_that_is_not_complete_is_named(written, n_lines, n_batches, message) -> None:
    path, lines = written
    path.write_bytes(b"".join(lines[:n_lines]))
    n, text = read_until_it_breaks(path)
    assert n == n_batches
    assert message in text
    with TrajectoryWriter(path) as writer:  # as a run that goes on would
        writer.write([])
    n, text = read_until_it_breaks(path)
    assert n == n_batches
    assert f"when it comes to {path}, line {n_lines + 1}, expected all of them" in text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"schema_version": 2}, "line 2: schema_version is 2, expected 1"),
        ({"schema_version": None}, "line 2: schema_version is None, expected 1"),
        ({"trajectories": 3}, "line 2 cannot be read (TypeError: 'int' object is not iterable)"),
        ({"trajectories": [{}]}, "line 2 cannot be read (KeyError: 'prompt_ids')"),
        ({"kind": "crowd"}, "line 1 has 0 of its 2 group records when it comes to"),
    ],
)
def test_what_is_no_record_is_named(written, edit, message) -> None:
    path, lines = written
    lines[1] = json.dumps({**json.loads(lines[1]), **edit}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    n, text = read_until_it_breaks(path)
    assert n == 0
    assert message in text


def test_a_file_of_something_else_is_named(tmp_path) -> None:
    path = tmp_path / "t.jsonl"
    for text, message in [
        ("hello\n", "line 1 cannot be read (JSONDecodeError"),
        ("[1]\n", "line 1: schema_version is None, expected 1"),
        ('{"schema_version": 1, "kind": "group"}\n', "line 1 is a 'group' record, expected"),
        ('{"schema_version": 1, "kind": "batch"}\n', "line 1 cannot be read (KeyError: 'context')"),
    ]:
        path.write_text(text)
        assert message in read_until_it_breaks(path)[1]
    path.write_text("")
    assert list(read_trajectories(path)) == []


def test_what_cannot_be_written_leaves_the_file_as_it_was(written) -> None:
    path, lines = written
    parent = Trajectory((1,), seed=3)
    group = RolloutGroup((1,), [parent])
    other = StepGroup(parent, 0, (1,), [Trajectory((1, 2))])
    with TrajectoryWriter(path) as writer:
        for groups, steps, context, message in [
            ([], [other], {}, r"the parent of a step group \(seed 3\) is in none of the groups"),
            ([group], [other], {}, "a continuation has a prompt of 2 tokens, expected the 1"),
            ([group], [], {"loss": math.nan}, "context {'loss': nan}: .* expected JSON values"),
            ([group], [], {"loss": object()}, "context .* expected JSON values"),
        ]:
            with pytest.raises(DataError, match=message):
                writer.write(groups, steps, **context)
    writer.close()
    assert path.read_bytes() == b"".join(lines)
