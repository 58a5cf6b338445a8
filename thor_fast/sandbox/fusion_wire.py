"""Requests and results as SandboxFusion's ``/run_code`` takes and gives them.

Field names: ``sandbox/server/sandbox_api.py`` and ``sandbox/runners/types.py`` of
bytedance/SandboxFusion.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from thor_fast.sandbox.base import stays_below
from thor_fast.sandbox.wire import SandboxLimits
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["AnswerError", "decode_result", "encode_request", "with_defaults"]

# Beyond it the server drops output without a word (_MAX_CAPTURED_OUTPUT_BYTES in its base.py).
_SERVER_OUTPUT_BYTES = 1 << 20


class AnswerError(ValueError):
    """An answer is not one of the protocol."""


def with_defaults(
    request: ExecutionRequest, defaults: tuple[float, int | None, int]
) -> tuple[float, int | None, int]:
    """Time limit in seconds, memory (``None``: the server's) and output limits in bytes.

    Raises ``ValueError`` or ``TypeError`` where ``SandboxLimits`` would.
    """
    timeout_s = defaults[0] if request.timeout_s is None else request.timeout_s
    memory = defaults[1] if request.memory_bytes is None else request.memory_bytes
    output = defaults[2] if request.max_output_bytes is None else request.max_output_bytes
    SandboxLimits(timeout_s=timeout_s, max_output_bytes=output)
    if memory is not None:
        SandboxLimits(memory_bytes=memory)
    return timeout_s, memory, output


def encode_request(request: ExecutionRequest, timeout_s: float, memory_bytes: int | None) -> bytes:
    """The request's JSON; raises ``ValueError`` or ``TypeError`` for what a caller got wrong."""
    if request.language != "python":
        raise ValueError(f"language is {request.language!r}, expected 'python'")
    if not isinstance(request.code, str):
        raise TypeError(f"code is {type(request.code).__name__}, expected str")
    unsupported: dict[str, object] = {
        "cpu_s": request.cpu_s,
        "max_processes": request.max_processes,
        "env": dict(request.env) or None,
    }
    for name, value in unsupported.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, expected none: the protocol has no such field")
    document: dict[str, Any] = {
        "code": request.code,
        "language": "python",
        "run_timeout": timeout_s,
        # JSON carries text only; a UnicodeDecodeError is a ValueError and names the byte.
        "stdin": request.stdin if isinstance(request.stdin, str) else request.stdin.decode(),
        "files": _encode_files(request),
    }
    if memory_bytes is not None:
        document["memory_limit_MB"] = math.ceil(memory_bytes / (1 << 20))
    return json.dumps(document).encode()


def _encode_files(request: ExecutionRequest) -> dict[str, str]:
    for name in request.files:
        if not stays_below(name):
            raise ValueError(f"file name {name!r}, expected a relative path without '..'")
    return {name: base64.b64encode(data).decode() for name, data in request.files.items()}


def decode_result(document: Any, max_output_bytes: int) -> ExecutionResult:
    """The result that an answer's JSON tells of; raises ``AnswerError`` where it tells of none."""
    fields = document if isinstance(document, dict) else {}
    if fields.get("status") == "SandboxError":
        problem = f"the server failed: {str(fields.get('message'))[:500]}"
        return ExecutionResult(Status.INFRA, error=problem)
    run = fields.get("run_result")
    if not isinstance(run, dict):
        raise AnswerError(f"run_result is {type(run).__name__}, expected an object")
    stdout, stdout_cut = _clipped(run, "stdout", max_output_bytes)
    stderr, stderr_cut = _clipped(run, "stderr", max_output_bytes)
    if run.get("status") == "Error":
        problem = f"the server could not run it: {stderr[:500]}"
        return ExecutionResult(Status.INFRA, error=problem)
    status, exit_code, signal = _ending(run.get("status"), run.get("return_code"))
    truncated = stdout_cut or stderr_cut
    if truncated and status is not Status.TIMEOUT:
        status = Status.OUTPUT
    wall_s = run.get("execution_time")
    return ExecutionResult(
        status=status,
        stdout=stdout,
        stderr=stderr,
        exit_code=exit_code,
        signal=signal,
        wall_s=float(wall_s) if isinstance(wall_s, int | float) else 0.0,
        truncated=truncated,
    )


def _ending(status: object, return_code: object) -> tuple[Status, int | None, int | None]:
    """Status, exit code and signal of a run that took place."""
    if status == "TimeLimitExceeded":
        return Status.TIMEOUT, None, None
    if status != "Finished":
        raise AnswerError(f"run status {status!r}, expected Finished, Error or TimeLimitExceeded")
    if isinstance(return_code, bool) or not isinstance(return_code, int):
        raise AnswerError(f"return_code is {return_code!r}, expected a whole number")
    if return_code < 0:  # as Python's subprocess reports a signal
        return Status.ERROR, None, -return_code
    return (Status.ERROR if return_code else Status.OK), return_code, None


def _clipped(run: dict[str, Any], name: str, most: int) -> tuple[str, bool]:
    """A stream, head and tail of it where it is too long, and whether anything is missing."""
    text = run.get(name)
    if not isinstance(text, str | None):
        raise AnswerError(f"{name} is {type(text).__name__}, expected a string or null")
    stream = (text or "").encode("utf-8", "replace")
    if len(stream) <= most:
        return stream.decode(), len(stream) == _SERVER_OUTPUT_BYTES
    head, tail = stream[: most - most // 2], stream[len(stream) - most // 2 :]
    mark = f"\n... [{len(stream) - most} bytes omitted] ...\n"
    return head.decode("utf-8", "replace") + mark + tail.decode("utf-8", "replace"), True
