"""Rollouts on disk: JSON lines, exact, and a run that was killed shows.

A batch is what one :meth:`TrajectoryWriter.write` was given: a line that says what follows, then a
line per group and per step group::

    {"schema_version": 1, "kind": "batch", "context": {"step": 3}, "groups": 2, "step_groups": 1}
    {"schema_version": 1, "kind": "group", "task_id": "a", "prompt_ids": [...], "trajectories": ...}
    {"schema_version": 1, "kind": "group", ...}
    {"schema_version": 1, "kind": "step_group", "parent": [1, 0], "call_index": 2, "cut": 57, ...}

A step group names its parent by group and sample of its batch; of its continuations the prompt is
left out, being the parent's first ``cut`` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from thor_fast.errors import DataError
from thor_fast.rollout.record_fields import (
    read_trajectory,
    text_of,
    trajectory_fields,
    written_text,
)
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.types import RolloutGroup, StepGroup

__all__ = ["SCHEMA_VERSION", "RecordedBatch", "TrajectoryWriter", "read_trajectories"]

SCHEMA_VERSION = 1

Json = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """What one ``write`` was given. Parents of step groups are the trajectories in ``groups``."""

    context: Mapping[str, Any]
    groups: list[RolloutGroup]
    step_groups: list[StepGroup]


class TrajectoryWriter(ClosedOnExit):
    """Appends batches to a file, which is created if need be; a context manager.

    Each batch has left this process when ``write`` returns. Raises ``DataError`` for a file whose
    last line is half-written: appending to it would spoil the next one.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = self._path.open("ab+")
        if self._file.tell():
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._file.close()
                raise DataError(f"{self._path} ends in a half-written line, expected a newline")

    def write(
        self,
        groups: Sequence[RolloutGroup],
        step_groups: Sequence[StepGroup] = (),
        **context: Any,
    ) -> None:
        """Append one batch. ``context``: JSON values to find it by, such as a step's number.

        Raises ``DataError``, with nothing written, for a step group whose parent is not in
        ``groups``, or a context that JSON cannot hold.
        """
        places = {id(t): (i, k) for i, g in enumerate(groups) for k, t in enumerate(g.trajectories)}
        try:
            json.dumps(context, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"context {context!r}: {error}, expected JSON values") from error
        head = {"context": context, "groups": len(groups), "step_groups": len(step_groups)}
        records = [
            {"kind": "batch", **head},
            *(_group(g) for g in groups),
            *(_step_group(s, places) for s in step_groups),
        ]
        data = "".join(
            json.dumps({"schema_version": SCHEMA_VERSION, **record}, allow_nan=False) + "\n"
            for record in records
        )
        self._file.write(data.encode())
        self._file.flush()

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()


def read_trajectories(path: str | Path) -> Iterator[RecordedBatch]:
    """The batches of a file, in order, each read when it is asked for.

    Raises ``DataError``, with the line's number, for another schema version, a line that is no
    record, and a batch that is not complete: what a killed run leaves. The batches before that have
    been given by then.
    """
    lines = _lines(Path(path))
    for where, head in lines:
        if head.get("kind") != "batch":
            raise DataError(
                f"{where} is a {head.get('kind')!r} record, expected a 'batch' to begin"
            )
        yield _batch(where, head, lines)


def _batch(where: str, head: Json, lines: Iterator[tuple[str, Json]]) -> RecordedBatch:
    """The batch that ``head`` begins; the rest of it is next in ``lines``."""
    context, n_groups, n_steps = _parsed(
        where, head, lambda r: (dict(r["context"]), int(r["groups"]), int(r["step_groups"]))
    )
    groups = _members("group", n_groups, where, lines, _read_group)
    read_step = partial(_read_step_group, groups=groups)
    return RecordedBatch(context, groups, _members("step_group", n_steps, where, lines, read_step))


def _members(
    kind: str, n: int, batch: str, lines: Iterator[tuple[str, Json]], read: Callable[[Json], _T]
) -> list[_T]:
    """The next ``n`` records of a batch."""
    found: list[_T] = []
    for index in range(n):
        where, record = next(lines, ("the end of the file", {}))
        if record.get("kind") != kind:
            raise DataError(
                f"the batch of {batch} has {index} of its {n} {kind} records when it comes to "
                f"{where}, expected all of them: the run that wrote it was killed"
            )
        found.append(_parsed(where, record, read))
    return found


def _lines(path: Path) -> Iterator[tuple[str, Json]]:
    """Each line's name for messages, and the record on it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.endswith(b"\n"):
                raise DataError(
                    f"{where} is half-written ({len(line)} bytes and no newline), expected a whole "
                    "record: the run that wrote it was killed"
                )
            record = _parsed(where, line, json.loads)
            version = record.get("schema_version") if isinstance(record, dict) else None
            if version != SCHEMA_VERSION:
                raise DataError(f"{where}: schema_version is {version}, expected {SCHEMA_VERSION}")
            yield where, record


def _parsed(where: str, record: Any, read: Callable[[Any], _T]) -> _T:
    try:
        return read(record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} cannot be read ({type(error).__name__}: {error}), expected a record of "
            f"schema version {SCHEMA_VERSION}"
        ) from error


def _group(group: RolloutGroup) -> Json:
    return {
        "kind": "group",
        "task_id": written_text(group.task_id),
        "prompt_ids": group.prompt_ids,
        "trajectories": [
            {"prompt_ids": t.prompt_ids, **trajectory_fields(t)} for t in group.trajectories
        ],
    }


def _read_group(record: Json) -> RolloutGroup:
    return RolloutGroup(
        tuple(record["prompt_ids"]),
        [read_trajectory(t, tuple(t["prompt_ids"])) for t in record["trajectories"]],
        text_of(record["task_id"]),
    )


def _step_group(step: StepGroup, places: Mapping[int, tuple[int, int]]) -> Json:
    if id(step.parent) not in places:
        raise DataError(
            f"the parent of a step group (seed {step.parent.seed}) is in none of the groups, "
            "expected it in the same batch"
        )
    strangers = [t for t in step.continuations if t.prompt_ids != step.prefix_ids]
    if strangers:
        raise DataError(
            f"a continuation has a prompt of {len(strangers[0].prompt_ids)} tokens, expected the "
            f"{len(step.prefix_ids)} of the prefix"
        )
    return {
        "kind": "step_group",
        "parent": places[id(step.parent)],
        "call_index": step.call_index,
        "cut": len(step.prefix_ids),
        "continuations": [trajectory_fields(t) for t in step.continuations],
    }


def _read_step_group(record: Json, groups: Sequence[RolloutGroup]) -> StepGroup:
    group, sample = record["parent"]
    parent = groups[group].trajectories[sample]
    prefix = tuple(parent.token_ids[: record["cut"]])
    continuations = [read_trajectory(t, prefix) for t in record["continuations"]]
    return StepGroup(parent, record["call_index"], prefix, continuations)
