"""Trajectories as JSON values and back, exactly.

JSON has no NaN, no infinity and no bytes, and its text is UTF-8, which a lone surrogate is not. So
such a float is written as its name (``float("nan")`` reads it), bytes as base64, and text that
UTF-8 cannot hold as ``{"surrogates": base64}``. All other floats are written with ``repr``, which
is exact. Functions that read raise ``KeyError``, ``TypeError`` or ``ValueError`` on what is not a
record; :mod:`thor_fast.rollout.records` says where that was.
"""

from __future__ import annotations

import base64
import math
from typing import Any

from thor_fast.types import (
    Attempt,
    ExecutionResult,
    Segment,
    Status,
    StopReason,
    TokenSource,
    ToolCall,
    Trajectory,
)

__all__ = ["read_trajectory", "text_of", "trajectory_fields", "written_text"]

Json = dict[str, Any]


def trajectory_fields(trajectory: Trajectory) -> Json:
    """All of a trajectory but its prompt."""
    stop, reward = trajectory.stop_reason, trajectory.reward
    return {
        "segments": [_segment(s) for s in trajectory.segments],
        "tool_calls": [_call(c) for c in trajectory.tool_calls],
        "stop_reason": None if stop is None else stop.value,
        "reward": None if reward is None else _number(reward),
        "seed": trajectory.seed,
        "weight_version": trajectory.weight_version,
        "error": written_text(trajectory.error),
        "metrics": {name: _number(value) for name, value in trajectory.metrics.items()},
        "reseeded": trajectory.reseeded,
        "attempts": [_attempt(a) for a in trajectory.attempts],
    }


def read_trajectory(record: Json, prompt_ids: tuple[int, ...]) -> Trajectory:
    """The trajectory that :func:`trajectory_fields` has written."""
    stop, reward = record["stop_reason"], record["reward"]
    return Trajectory(
        prompt_ids,
        [_read_segment(s) for s in record["segments"]],
        [_read_call(c) for c in record["tool_calls"]],
        None if stop is None else StopReason(stop),
        None if reward is None else float(reward),
        record["seed"],
        record["weight_version"],
        text_of(record["error"]),
        {name: float(value) for name, value in record["metrics"].items()},
        [(position, seed) for position, seed in record["reseeded"]],
        [_read_attempt(a) for a in record["attempts"]],
    )


def written_text(text: str) -> str | Json:
    """``text``, or what stands for it where it holds surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return {"surrogates": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()}
    return text


def text_of(value: str | Json) -> str:
    """The text that :func:`written_text` has written."""
    if isinstance(value, str):
        return value
    return base64.b64decode(value["surrogates"], validate=True).decode("utf-8", "surrogatepass")


def _number(value: float) -> float | str:
    # numpy's floats are floats, too, but do not all print as such.
    return float(value) if math.isfinite(value) else repr(float(value))


def _segment(segment: Segment) -> Json:
    logprobs = segment.logprobs
    return {
        "source": segment.source.value,
        "token_ids": segment.token_ids,
        "logprobs": None if logprobs is None else [_number(p) for p in logprobs],
    }


def _read_segment(record: Json) -> Segment:
    logprobs = record["logprobs"]
    return Segment(
        TokenSource(record["source"]),
        tuple(record["token_ids"]),
        None if logprobs is None else tuple(float(p) for p in logprobs),
    )


def _call(call: ToolCall) -> Json:
    return {
        "code": written_text(call.code),
        "start": call.start,
        "end": call.end,
        "result": None if call.result is None else _result(call.result),
        "observation": written_text(call.observation),
        "attempt": call.attempt,
    }


def _read_call(record: Json) -> ToolCall:
    return ToolCall(
        text_of(record["code"]),
        record["start"],
        record["end"],
        None if record["result"] is None else _read_result(record["result"]),
        text_of(record["observation"]),
        record["attempt"],
    )


def _result(result: ExecutionResult) -> Json:
    return {
        "status": result.status.value,
        "stdout": written_text(result.stdout),
        "stderr": written_text(result.stderr),
        "exit_code": result.exit_code,
        "signal": result.signal,
        "wall_s": _number(result.wall_s),
        "cpu_s": _number(result.cpu_s),
        "peak_memory_bytes": result.peak_memory_bytes,
        "truncated": result.truncated,
        "error": written_text(result.error),
        "files": {name: base64.b64encode(data).decode() for name, data in result.files.items()},
    }


def _read_result(record: Json) -> ExecutionResult:
    return ExecutionResult(
        Status(record["status"]),
        text_of(record["stdout"]),
        text_of(record["stderr"]),
        record["exit_code"],
        record["signal"],
        float(record["wall_s"]),
        float(record["cpu_s"]),
        record["peak_memory_bytes"],
        record["truncated"],
        text_of(record["error"]),
        {name: base64.b64decode(data, validate=True) for name, data in record["files"].items()},
    )


def _attempt(attempt: Attempt) -> Json:
    return {
        "cut": attempt.cut,
        "segments": [_segment(s) for s in attempt.segments],
        "call": _call(attempt.call),
        "call_index": attempt.call_index,
        "reseeded": attempt.reseeded,
        "hint": attempt.hint,
    }


def _read_attempt(record: Json) -> Attempt:
    return Attempt(
        record["cut"],
        tuple(_read_segment(s) for s in record["segments"]),
        _read_call(record["call"]),
        record["call_index"],
        tuple((position, seed) for position, seed in record["reseeded"]),
        record["hint"],
    )
