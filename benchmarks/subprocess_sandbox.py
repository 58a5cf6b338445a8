"""The usual way to run a model's Python: a fresh interpreter per snippet, as a plain subprocess.

UNSAFE, and here only to be measured against: the snippet has the rights of the benchmark. Wall time
and output are limited; memory, CPU time and processes are not, and what a snippet forks off
survives it. ``-S`` skips ``site``, so that no start-up hooks slow the baseline down: an interpreter
starts in about 10 ms this way. What is installed can be imported all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from thor_fast.errors import SandboxError
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["SubprocessSandbox"]

_TIMEOUT_S = 10.0
_MAX_OUTPUT_BYTES = 64 * 1024
_PACKAGES = sysconfig.get_path("purelib")


class SubprocessSandbox(ClosedOnExit):
    """Keeps :class:`thor_fast.sandbox.base.Sandbox`. ``workers``: snippets that run at a time.

    Eight is what THOR's rollout uses.
    """

    def __init__(self, workers: int = 8) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="subprocess-sandbox")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        return self.execute_batch([request])[0]

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        self._check_open()
        runs = [self._pool.submit(_Run(self, request)) for request in requests]
        return [run.result() for run in runs]

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        self._check_open()
        run = _Run(self, request)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, run)
        except asyncio.CancelledError:
            run.kill()
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()
        self._pool.shutdown()

    def started(self, process: subprocess.Popen[bytes]) -> None:
        """Note a snippet that runs; kills it if the sandbox was closed meanwhile."""
        with self._lock:
            self._running.add(process)
            if self._closed:
                process.kill()

    def ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Note that it is over; True if that was :meth:`close`'s doing."""
        with self._lock:
            self._running.discard(process)
            return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise SandboxError("the sandbox is closed, expected an open one")


class _Run:
    """One snippet, on a thread of the pool."""

    def __init__(self, sandbox: SubprocessSandbox, request: ExecutionRequest | str) -> None:
        self._sandbox = sandbox
        self._request = ExecutionRequest(request) if isinstance(request, str) else request
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def kill(self) -> None:
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def __call__(self) -> ExecutionResult:
        if self._killed:
            return ExecutionResult(Status.INFRA, error="cancelled before it started")
        with tempfile.TemporaryDirectory() as folder:
            return self._execute(Path(folder))

    def _execute(self, folder: Path) -> ExecutionResult:
        request = self._request
        for name, content in request.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        stdin = request.stdin.encode() if isinstance(request.stdin, str) else request.stdin
        started = time.perf_counter()
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-c", request.code],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": _PACKAGES, **request.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._sandbox.started(process)
        timed_out = False
        try:
            out, err = process.communicate(stdin, timeout=request.timeout_s or _TIMEOUT_S)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            out, err = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            closed = self._sandbox.ended(process)
        wall_s = time.perf_counter() - started
        if closed or self._killed:
            return ExecutionResult(Status.INFRA, error="the sandbox was closed", wall_s=wall_s)
        return _result(request, process.returncode, out, err, wall_s, timed_out=timed_out)


def _result(
    request: ExecutionRequest,
    code: int,
    out: bytes,
    err: bytes,
    wall_s: float,
    *,
    timed_out: bool,
) -> ExecutionResult:
    limit = request.max_output_bytes or _MAX_OUTPUT_BYTES
    truncated = max(len(out), len(err)) > limit
    status = Status.OK if code == 0 else Status.ERROR
    if truncated:
        status = Status.OUTPUT
    if timed_out:
        status = Status.TIMEOUT
    return ExecutionResult(
        status,
        stdout=out[:limit].decode(errors="replace"),
        stderr=err[:limit].decode(errors="replace"),
        exit_code=code if code >= 0 and not timed_out else None,
        signal=-code if code < 0 and not timed_out else None,
        wall_s=wall_s,
        truncated=truncated,
    )
