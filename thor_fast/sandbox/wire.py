"""Requests and results as the native core takes and gives them."""

from __future__ import annotations

import json
import marshal
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from thor_fast import _core
from thor_fast.sandbox.base import stays_below
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

if TYPE_CHECKING:
    from thor_fast._core import Completion

__all__ = [
    "Determinism",
    "Mode",
    "SandboxLimits",
    "check_limits",
    "decode_reply",
    "decode_result",
    "encode_limits",
    "encode_request",
    "encode_step",
]

# The newest format that every supported interpreter reads and writes.
_MARSHAL_VERSION = 4
# The core counts nanoseconds and bytes in 64 bits, processes in 32; nobody needs what is near that.
_MOST_SECONDS = 10**9
_MOST_BYTES = 2**50
_MOST_COUNT = 2**31 - 1
# Half of the working directory's tmpfs, which the snippet needs room in too.
_MOST_FILE_BYTES = 32 << 20
# csrc/core/protocol.h and collect.h: what fits one message and one page.
_MOST_COLLECTED = 32
_MOST_COLLECT_BYTES = 3_000


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
        check_limits(
            timeout_s=self.timeout_s,
            cpu_s=self.cpu_s,
            memory_bytes=self.memory_bytes,
            max_output_bytes=self.max_output_bytes,
            max_processes=self.max_processes,
        )


@dataclass(frozen=True, slots=True)
class Determinism:
    """The same code gives the same output: see ``guest/frozen.py`` for what is covered.

    ``seed``: of hashes, ``random``, numpy and what asks the system for entropy. ``now``: seconds
    since the epoch that the first reading of a clock gives.
    """

    seed: int = 0
    now: float = 1_700_000_000.0


Mode = Literal["block", "stream", "session", "rewindable session"]


def encode_request(
    request: ExecutionRequest,
    defaults: SandboxLimits,
    *,
    tier: int,
    mode: Mode = "block",
    determinism: Determinism | None = None,
    life_s: float = 1.0,
) -> _core.Request:
    """What the core is asked. ``life_s`` is of a stream or session.

    Raises ``ValueError`` or ``TypeError`` for what a caller got wrong; code that does not compile
    or text that is no valid Unicode is not wrong, it is data.
    """
    if request.language != "python":
        raise ValueError(f"language is {request.language!r}, expected 'python'")
    if not isinstance(request.code, str):
        raise TypeError(f"code is {type(request.code).__name__}, expected str")
    stdin = request.stdin
    check_limits(life_s=life_s)  # before others: a session's cpu_s may come from it
    fixed = None if determinism is None else (determinism.seed, determinism.now)
    # A file may begin with a byte-order mark; text that is compiled may not.
    code = request.code.removeprefix("\ufeff")
    payload = (mode, code, _checked_files(request), _checked_env(request), fixed)
    return _core.Request(
        payload=marshal.dumps(payload, _MARSHAL_VERSION),
        stdin_data=stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin,
        limits=encode_limits(request, defaults),
        tier=tier,
        priority=_checked_priority(request.priority),
        collect=_checked_collect(request.collect),
        accumulate=mode == "stream",
        life_s=life_s,
    )


def encode_limits(request: ExecutionRequest, defaults: SandboxLimits) -> _core.Limits:
    """The request's limits, the sandbox's where it names none."""
    limits = {
        name: getattr(defaults if getattr(request, name) is None else request, name)
        for name in ("timeout_s", "cpu_s", "memory_bytes", "max_output_bytes", "max_processes")
    }
    if limits["cpu_s"] is None:
        limits["cpu_s"] = limits["timeout_s"]
    check_limits(**limits)
    return _core.Limits(**limits)


def decode_result(done: Completion) -> ExecutionResult:
    """The result behind one completion; output that is not UTF-8 is shown with replacements."""
    _, status, stdout, stderr, exit_code, signal, wall_s, cpu_s, peak, truncated = done[:10]
    files, _, error = done[10:]
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
        files=files,
    )


def encode_step(*step: str | float | list[int]) -> bytes:
    """A step of a dialogue, as ``guest/dialogue.py`` and ``guest/router.py`` read it."""
    return marshal.dumps(step, _MARSHAL_VERSION)


def decode_reply(done: Completion) -> tuple[object, ...] | None:
    """What a dialogue's guest answered; ``None`` if its process is over.

    The snippet could have written it: as JSON it cannot harm us, and no answer makes this raise.
    """
    reply = done[-2]
    if not reply:
        return None
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError):
        return ("garbled",)
    return tuple(answer) if isinstance(answer, list) and answer else ("garbled",)


def check_limits(**limits: float | None) -> None:
    """By name, whose ending tells the unit: seconds, bytes or a count.

    Raises ``TypeError`` or ``ValueError`` for what the core has no room for.
    """
    for name, value in limits.items():
        if value is None:
            continue
        kind: type | tuple[type, ...] = int
        most = _MOST_BYTES if name.endswith("_bytes") else _MOST_COUNT
        if name.endswith("_s"):
            kind, most = (int, float), _MOST_SECONDS
        if isinstance(value, bool) or not isinstance(value, kind):
            expected = "a whole number" if kind is int else "a number"
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}, expected > 0 and at most {most}")


def _checked_files(request: ExecutionRequest) -> dict[str, bytes]:
    for name in request.files:
        if not stays_below(name):
            raise ValueError(f"file name {name!r}, expected a relative path without '..'")
    total = sum(len(content) for content in request.files.values())
    if total > _MOST_FILE_BYTES:
        raise ValueError(f"files hold {total} bytes, expected at most {_MOST_FILE_BYTES}")
    return {name: bytes(content) for name, content in request.files.items()}


def _checked_collect(paths: tuple[str, ...]) -> list[str]:
    for path in paths:
        if not stays_below(path):
            raise ValueError(f"path to collect {path!r}, expected a relative one without '..'")
    size = sum(len(os.fsencode(path)) + 1 for path in paths)
    if len(paths) > _MOST_COLLECTED or size > _MOST_COLLECT_BYTES:
        raise ValueError(
            f"{len(paths)} paths to collect with {size} bytes, expected at most "
            f"{_MOST_COLLECTED} with {_MOST_COLLECT_BYTES}"
        )
    return list(paths)


def _checked_priority(priority: int) -> int:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**31:
        raise ValueError(f"priority is {priority!r}, expected a whole number of 32 bits")
    return priority


def _checked_env(request: ExecutionRequest) -> dict[str, str]:
    for name, value in request.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"environment variable {name!r}, expected a name without '=' or NUL")
    return dict(request.env)
