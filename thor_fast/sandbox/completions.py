"""How results reach who waits for them: a blocked thread, or an event loop through an eventfd."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING

from thor_fast import _core

if TYPE_CHECKING:
    from thor_fast._core import Completion

__all__ = ["LoopSink", "ThreadSink"]

# How often a blocking wait wakes to let Python run signal handlers (Ctrl-C).
_SIGNAL_CHECK_MS = 100


class ThreadSink:
    """For calls that block: hands out completions as they come, with the GIL released."""

    def __init__(self) -> None:
        self.queue = _core.CompletionQueue()

    def wait(self) -> list[Completion]:
        """Those that have come since, possibly none."""
        return self.queue.wait(timeout_ms=_SIGNAL_CHECK_MS)

    def take(self, ticket: int) -> Completion:
        """Block until that one has come; others that come before it are dropped."""
        while True:
            for done in self.wait():
                if done[0] == ticket:
                    return done


class LoopSink:
    """For one event loop: a reader on the queue's eventfd resolves futures."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = _core.CompletionQueue()
        # A weak reference: the sink is a value of a mapping keyed weakly by the loop.
        self._loop = weakref.ref(loop)
        self._futures: dict[int, asyncio.Future[Completion]] = {}

    def expect(self, ticket: int) -> asyncio.Future[Completion]:
        """Resolved with the completion of ``ticket``; to be called on the loop."""
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
                future.set_result(done)
        if not self._futures:
            loop.remove_reader(self.queue.event_fd())
