"""The contract every sandbox backend keeps (one contract test-suite runs on all of them).

What the *snippet* does is a :class:`Status` in the result. What *we* fail to do while a request is
in flight is ``Status.INFRA``; what the caller does wrong, or a sandbox that cannot start, is a
:class:`~thor_fast.errors.SandboxError` or ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = [
    "ClosedOnExit",
    "ExecutionRequest",
    "ExecutionResult",
    "ExecutionStream",
    "Sandbox",
    "Status",
    "StreamingSandbox",
    "stays_below",
]


@runtime_checkable
class Sandbox(Protocol):
    """Runs snippets apart from each other and from the host.

    Each of the three calls takes an :class:`ExecutionRequest` or the source as ``str`` (default
    limits), and may be used from any thread. Once closed, each raises ``SandboxError``.
    """

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet; blocks the calling thread with the GIL released."""
        ...

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        """Run many; results in the order of the requests; blocks like :meth:`execute`."""
        ...

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        """Run one snippet without blocking the event loop; cancelling kills the snippet."""
        ...

    def close(self) -> None:
        """Kill what runs (its requests end as INFRA), free everything. Safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...


class ExecutionStream(Protocol):
    """A block that runs while its text arrives; its result is that of the whole block."""

    def feed(self, text: str) -> None:
        """Add text; returns at once. ``SandboxError`` once closed, or when a queue is full."""
        ...

    async def afinish(self, rest: str = "") -> ExecutionResult:
        """Add the last of the text, run what is left, close."""
        ...

    def close(self) -> None:
        """Kill what runs. Safe to call twice."""
        ...


@runtime_checkable
class StreamingSandbox(Sandbox, Protocol):
    """A sandbox that can also start on a block whose end is not known yet."""

    def open(self, request: ExecutionRequest | None = None) -> ExecutionStream:
        """A stream; ``request`` gives all but its code. ``SandboxError`` if too many are open."""
        ...


class ClosedOnExit:
    """Makes whatever has a ``close`` a context manager that calls it at the end."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def stays_below(name: str) -> bool:
    """Whether ``name`` is a relative path that does not leave the directory it starts in."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name)
