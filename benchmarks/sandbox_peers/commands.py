"""Backends that start a process per snippet: plain, in bubblewrap, in nsjail."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Sequence

from sandbox_peers.interpreter import Interpreter
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["Bubblewrap", "Nsjail", "PlainSubprocess"]

# What a snippet may use on top of an interpreter with numpy and sympy, in MiB.
_ADDRESS_SPACE_MIB = 1536
_TMPFS_BYTES = 64 << 20


class PlainSubprocess:
    """``subprocess.run([python, "-I", "-c", code])``: no isolation, no limit but the time."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._python = (interpreter.path, "-I", "-c")

    def execute(self, request: ExecutionRequest) -> ExecutionResult:
        return _run([*self._python, request.code], _seconds(request))


class Bubblewrap:
    """``bwrap``: every namespace, read-only root, no capabilities; memory is not limited."""

    def __init__(self, bwrap: str, interpreter: Interpreter) -> None:
        # The tmpfs first: the interpreter may lie below /tmp. Remounted last: all is in place.
        mounts = ["--tmpfs", "/tmp"]
        for path in interpreter.readonly:
            mounts += ["--ro-bind", path, path]
        mounts += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp", "--remount-ro", "/"]
        self._prefix = [
            *(bwrap, "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000"),
            *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
            *mounts,
            *("--", interpreter.path, "-I", "-c"),
        ]

    def execute(self, request: ExecutionRequest) -> ExecutionResult:
        return _run([*self._prefix, request.code], _seconds(request))


class Nsjail:
    """``nsjail``: every namespace, read-only root, rlimits, its own time limit; no seccomp policy.

    The caller's uid stays behind the mapping, as nsjail does unless told otherwise.
    """

    def __init__(self, nsjail: str, interpreter: Interpreter) -> None:
        mounts = ["-m", f"none:/tmp:tmpfs:size={_TMPFS_BYTES}"]
        for path in (*interpreter.readonly, "/dev/null", "/dev/urandom"):
            mounts += ["-R", path]
        self._prefix = [
            *(nsjail, "-Mo", "--really_quiet", "--nice_level", "0", "-u", "1000", "-g", "1000"),
            *mounts,
            *("-D", "/tmp", "--rlimit_as", str(_ADDRESS_SPACE_MIB), "--rlimit_nofile", "64"),
            *("--rlimit_fsize", "64", "--rlimit_nproc", "64"),
        ]
        self._python = ("--", interpreter.path, "-I", "-c")

    def execute(self, request: ExecutionRequest) -> ExecutionResult:
        limit_s = math.ceil(_seconds(request))  # whole seconds are all it knows
        command = [*self._prefix, "-t", str(limit_s), *self._python, request.code]
        result = _run(command, limit_s + 5.0)
        # 137 is its answer to any kill; after this long it was the time limit's.
        if result.exit_code == 137 and result.wall_s >= limit_s:
            return ExecutionResult(Status.TIMEOUT, result.stdout, result.stderr)
        return result


def _seconds(request: ExecutionRequest) -> float:
    assert request.timeout_s is not None  # every snippet of the benchmark names it
    return request.timeout_s


def _run(command: Sequence[str], timeout_s: float) -> ExecutionResult:
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as late:
        return ExecutionResult(Status.TIMEOUT, _text(late.stdout), _text(late.stderr))
    code = done.returncode
    return ExecutionResult(
        status=Status.OK if code == 0 else Status.ERROR,
        stdout=_text(done.stdout),
        stderr=_text(done.stderr),
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        wall_s=time.perf_counter() - started,
    )


def _text(stream: bytes | None) -> str:
    return (stream or b"").decode("utf-8", "replace")
