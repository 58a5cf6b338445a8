"""Requests and results as the native core takes and gives them."""

from __future__ import annotations

import marshal
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from thor_fast.types import ExecutionRequest, ExecutionResult, Status

if TYPE_CHECKING:
    from thor_fast._core import Completion

__all__ = ["SandboxLimits", "decode_result", "encode_request"]

# The newest format that every supported interpreter reads and writes.
_MARSHAL_VERSION = 4
# The core counts nanoseconds and bytes in 64 bits; nobody needs what lies near that.
_MOST_SECONDS = 10**9
_MOST_COUNT = 2**50
# Half of the working directory's tmpfs, which the snippet needs room in too.
_MOST_FILE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Limits of requests that name none.

    ``timeout_s``: wall clock. ``cpu_s``: CPU seconds per process, rounded up to whole ones by the
    kernel; ``None``: as ``timeout_s``. ``memory_bytes``: private memory per process, on top of the
    interpreter's. ``max_output_bytes``: kept of each stream; beyond it the result is OUTPUT, and
    beyond 16 times it the snippet is killed. ``max_processes``: processes and threads at a time.
    """

    timeout_s: float = 10.0
    cpu_s: float | None = None
    memory_bytes: int = 1 << 30
    max_output_bytes: int = 1 << 20
    max_processes: int = 32

    def __post_init__(self) -> None:
        _check_limits(
            timeout_s=self.timeout_s,
            cpu_s=self.cpu_s,
            memory_bytes=self.memory_bytes,
            max_output_bytes=self.max_output_bytes,
            max_processes=self.max_processes,
        )


def encode_request(request: ExecutionRequest, defaults: SandboxLimits) -> dict[str, Any]:
    """Keyword arguments of ``_core.Orchestrator.submit``.

    Raises ``ValueError`` or ``TypeError`` for what a caller got wrong; code that does not compile
    or text that is no valid Unicode is not wrong, it is data.
    """
    if request.language != "python":
        raise ValueError(f"language is {request.language!r}, expected 'python'")
    if not isinstance(request.code, str):
        raise TypeError(f"code is {type(request.code).__name__}, expected str")
    limits = {
        name: getattr(defaults if getattr(request, name) is None else request, name)
        for name in ("timeout_s", "cpu_s", "memory_bytes", "max_output_bytes", "max_processes")
    }
    if limits["cpu_s"] is None:
        limits["cpu_s"] = limits["timeout_s"]
    _check_limits(**limits)
    stdin = request.stdin
    payload = (request.code, _checked_files(request), _checked_env(request))
    return {
        "payload": marshal.dumps(payload, _MARSHAL_VERSION),
        "stdin_data": stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin,
        **limits,
    }


def decode_result(done: Completion) -> ExecutionResult:
    """The result behind one completion; output that is not UTF-8 is shown with replacements."""
    _, status, stdout, stderr, exit_code, signal, wall_s, cpu_s, peak, truncated, error = done
    return ExecutionResult(
        status=Status(status),
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        exit_code=None if exit_code < 0 else exit_code,
        signal=signal or None,
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_memory_bytes=peak,
        truncated=truncated,
        error=error,
    )


def _check_limits(**limits: float | None) -> None:
    for name, value in limits.items():
        if value is None:
            continue
        kind, most = ((int, float), _MOST_SECONDS) if name.endswith("_s") else (int, _MOST_COUNT)
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "a whole number" if kind is int else "a number"
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}, expected > 0 and at most {most}")


def _checked_files(request: ExecutionRequest) -> dict[str, bytes]:
    for name in request.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"file name {name!r}, expected a relative path without '..'")
    total = sum(len(content) for content in request.files.values())
    if total > _MOST_FILE_BYTES:
        raise ValueError(f"files hold {total} bytes, expected at most {_MOST_FILE_BYTES}")
    return {name: bytes(content) for name, content in request.files.items()}


def _checked_env(request: ExecutionRequest) -> dict[str, str]:
    for name, value in request.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"environment variable {name!r}, expected a name without '=' or NUL")
    return dict(request.env)
