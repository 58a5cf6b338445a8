"""A persistent pool of interpreters: what speed costs no isolation at all."""

from __future__ import annotations

import marshal
import os
import queue
import select
import struct
import subprocess
import time
from pathlib import Path

from sandbox_peers.interpreter import Interpreter
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["WorkerPool"]


class WorkerPool(ClosedOnExit):
    """``workers`` interpreters that take turns. UNSAFE: no isolation between snippets.

    A worker is killed and replaced when its snippet exceeds the time limit, and only then.
    """

    def __init__(self, interpreter: Interpreter, workers: int) -> None:
        self._command = [interpreter.path, "-I", str(Path(__file__).with_name("pool_worker.py"))]
        self._workers: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._hire()

    def execute(self, request: ExecutionRequest) -> ExecutionResult:
        assert request.timeout_s is not None  # every snippet of the benchmark names it
        worker = self._idle.get()
        result = worker.run(request.code, request.timeout_s)
        if result.status in (Status.TIMEOUT, Status.INFRA):
            self._workers.discard(worker)
            worker.stop()
            self._hire()
        else:
            self._idle.put(worker)
        return result

    def _hire(self) -> None:
        worker = _Worker(self._command)
        self._workers.add(worker)
        self._idle.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()


class _Worker:
    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def run(self, code: str, timeout_s: float) -> ExecutionResult:
        source = code.encode()
        deadline = time.monotonic() + timeout_s
        try:
            assert self._process.stdin is not None  # PIPE above
            self._process.stdin.write(struct.pack("<I", len(source)) + source)
            (size,) = struct.unpack("<I", self._read(4, deadline))
            passed, stdout, stderr = marshal.loads(self._read(size, deadline))
        except TimeoutError:
            return ExecutionResult(Status.TIMEOUT)
        except (OSError, EOFError) as error:
            return ExecutionResult(Status.INFRA, error=f"the worker died: {error}")
        return ExecutionResult(Status.OK if passed else Status.ERROR, stdout, stderr)

    def stop(self) -> None:
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None  # PIPE above
        fd = self._process.stdout.fileno()
        parts = []
        while size:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(fd, size)
            if not part:
                raise EOFError("end of its output")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
