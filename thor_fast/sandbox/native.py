"""The native sandbox: snippets run in forks of a warm interpreter, each in namespaces of its own.

The C++ orchestrator (``csrc/core``) starts the interpreter, feeds it, watches clocks and pipes and
kills; this file translates requests and results, and joins the orchestrator to asyncio through one
eventfd per event loop. No thread waits per call and the GIL is free while anything waits.

What isolates a snippet, and what does not, is in ``docs/sandbox-security.md``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from typing import TYPE_CHECKING, Self

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox.launch import STDLIB_PRELOAD, zygote_command, zygote_environment
from thor_fast.sandbox.wire import SandboxLimits, decode_result, encode_request
from thor_fast.types import ExecutionRequest, ExecutionResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["NativeSandbox", "SandboxLimits"]

# How often a blocking wait wakes to let Python run signal handlers (Ctrl-C).
_SIGNAL_CHECK_MS = 100


class NativeSandbox:
    r"""Runs Python snippets; implements :class:`thor_fast.sandbox.base.Sandbox`.

    ``slots``: snippets that run at a time; default: the CPUs this process may use. More make
    limits meaningless: snippets would time out waiting for each other. ``limits``: what a request
    that names none gets. ``preload``: modules imported once, before the first snippet; each makes
    the snippets that use it faster and all others a little slower. ``queue_capacity``: requests
    that may wait; one more raises ``SandboxError`` at once.

    Raises ``SandboxError`` if the host does not grant what the jail needs; the message names the
    step and the system's error.

    >>> with NativeSandbox(slots=1) as sandbox:
    ...     result = sandbox.execute("print(6 * 7)")
    >>> result.stdout, result.passed
    ('42\n', True)
    """

    def __init__(
        self,
        *,
        slots: int | None = None,
        limits: SandboxLimits | None = None,
        preload: Sequence[str] = STDLIB_PRELOAD,
        queue_capacity: int = 65_536,
        startup_timeout_s: float = 60.0,
    ) -> None:
        self._limits = limits or SandboxLimits()
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopSink] = (
            weakref.WeakKeyDictionary()
        )
        slots = len(os.sched_getaffinity(0)) if slots is None else slots
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected >= 1")
        try:
            self._orchestrator = _core.Orchestrator(
                argv=zygote_command(preload),
                env=zygote_environment(),
                slots=slots,
                queue_capacity=queue_capacity,
                startup_timeout_s=startup_timeout_s,
            )
        except _core.StartError as error:
            raise SandboxError(str(error)) from None
        self._closed = False
        # Also at interpreter exit, before threads and modules are torn down.
        self._finalizer = weakref.finalize(self, _close, self._orchestrator, self._owner_pid)

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet; blocks the calling thread with the GIL released."""
        return self.execute_batch([request])[0]

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        """Run many; results in the order of the requests."""
        sink = _core.CompletionQueue()
        waiting: dict[int, int] = {}
        results: dict[int, ExecutionResult] = {}

        def take() -> None:
            for done in sink.wait(timeout_ms=_SIGNAL_CHECK_MS):
                results[waiting.pop(done[0])] = decode_result(done)

        try:
            for index, request in enumerate(requests):
                waiting[self._submit(request, sink)] = index
            while waiting:
                take()
        except BaseException:
            for ticket in waiting:
                self._orchestrator.cancel(ticket)
            while waiting:  # the slots are free again when the caller sees the exception
                take()
            raise
        return [results[index] for index in range(len(requests))]

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet without blocking the event loop; cancelling kills the snippet."""
        sink = self._loop_sink(asyncio.get_running_loop())
        ticket = self._submit(request, sink.queue)
        future = sink.expect(ticket)
        try:
            return await future
        except asyncio.CancelledError:
            self._orchestrator.cancel(ticket)
            raise

    def stats(self) -> dict[str, int]:
        """Counts since the start: submitted, completed, zygote_starts; now: queued, running."""
        return self._orchestrator.stats()

    def close(self) -> None:
        """Kill what runs (its requests end as INFRA) and free everything. Safe to call twice."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, request: ExecutionRequest | str, sink: _core.CompletionQueue) -> int:
        if self._closed:
            raise SandboxError("the sandbox is closed")
        if os.getpid() != self._owner_pid:
            raise SandboxError(
                f"this sandbox belongs to process {self._owner_pid}, got a call from its fork "
                f"{os.getpid()}: create one there"
            )
        if isinstance(request, str):
            request = ExecutionRequest(request)
        try:
            return self._orchestrator.submit(sink, **encode_request(request, self._limits))
        except (_core.QueueFullError, _core.StartError) as error:
            raise SandboxError(str(error)) from None

    def _loop_sink(self, loop: asyncio.AbstractEventLoop) -> _LoopSink:
        with self._lock:
            sink = self._loops.get(loop)
            if sink is None:
                sink = self._loops[loop] = _LoopSink(loop)
            return sink


class _LoopSink:
    """Delivers results on one event loop: a reader on the queue's eventfd resolves futures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = _core.CompletionQueue()
        # A weak reference: the sink is a value of a mapping keyed weakly by the loop.
        self._loop = weakref.ref(loop)
        self._futures: dict[int, asyncio.Future[ExecutionResult]] = {}

    def expect(self, ticket: int) -> asyncio.Future[ExecutionResult]:
        loop = self._loop()
        assert loop is not None  # we run on it
        if not self._futures:
            # Only while something is awaited, so that an idle loop may be closed and collected.
            loop.add_reader(self.queue.event_fd(), self._deliver, loop)
        future = self._futures[ticket] = loop.create_future()
        return future

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        for done in self.queue.drain():
            future = self._futures.pop(done[0])
            if not future.done():
                future.set_result(decode_result(done))
        if not self._futures:
            loop.remove_reader(self.queue.event_fd())


def _close(orchestrator: _core.Orchestrator, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a fork has neither the thread nor the zygote to stop
        orchestrator.close()
