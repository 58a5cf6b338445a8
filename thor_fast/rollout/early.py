"""Runs a block while the model still writes it.

Who does what::

    engine's thread              event loop                       sandbox
    ---------------              ----------                       -------
    watch -> draft(call):
      has it become worth it?
      --call_soon_threadsafe-->  open a stream, feed -----------> runs what is complete
    samples on                   (feeding returns at once)
    ...
    closing fence                finish(call): the rest --------> runs the rest
                                 <------- one result, that of the whole block

Neither side waits for the other: the engine's thread only looks at the text, and the loop only
hands it on. A stream is not free. Against a plain run it takes 0.4 ms more of this process's time,
each further piece 0.2 ms, and the fork that it hides is done in 0.3 ms. So text goes out only once
it has a complete statement that may take longer than that: one with a loop or a call in it; and
only where results have been waited for less that way (``early_gain.py``). A block without such a
statement before its last one is run as ever, and so is every block where the sandbox has no
streams, or no room for one more.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace

from thor_fast.errors import SandboxError
from thor_fast.rollout.early_gain import EarlyGain
from thor_fast.sandbox.base import ExecutionStream, Sandbox, StreamingSandbox
from thor_fast.tools.base import DetectedCall
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = ["EarlyRuns"]

# A statement that may take a while: a compound one, a comprehension, a call that is not just print.
# Definitions only bind a name; imports are left to the stream, which waits for what uses them.
_BUSY = re.compile(
    r"^(?:(?:for|if|try|while|with)\b"
    r"|(?!(?:async|class|def|from|import)\b|[\s#@])(?:.*\bfor\b|(?:(?!print\().)*\(|print\(.*\())",
    re.MULTILINE,
)


class EarlyRuns:
    """The blocks of one episode, each from its first statements on.

    ``request``: what the sandbox is to run for a call. ``gain``: of all episodes; without it every
    block that can begins early. Belongs to the event loop it is made on, all but :meth:`draft`.
    :meth:`close` it when the episode ends, whatever its end.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        request: Callable[[DetectedCall], ExecutionRequest],
        gain: EarlyGain | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._request = request
        self._gain = gain
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._block = 0
        self._looked = 0  # characters of this block that :meth:`draft` has judged
        self._begin: bool | None = None  # whether to run this block early; None if it cannot be
        self._fed = 0  # and that the stream has
        self._stream: ExecutionStream | None = None

    def draft(self, call: DetectedCall) -> None:
        """A call as far as it is written; from any thread, see :meth:`Tool.detector`."""
        complete = call.code.rfind("\n") + 1
        busy = _BUSY.search(call.code, self._looked, complete)
        self._looked = complete
        if busy is None:
            return
        if self._begin is None:
            self._begin = self._gain is None or self._gain.begin()
        if self._begin:
            # RuntimeError: the loop is closed, and with it the episode.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._feed, self._block, call)

    async def run(self, call: DetectedCall) -> tuple[ExecutionResult, bool]:
        """The result of the block that has closed, and whether it had been begun before.

        Raises ``SandboxError`` for a sandbox that is closed, or whose queue is full.
        """
        stream, fed, could = self._stream, self._fed, self._begin is not None
        self._next_block()
        started = time.perf_counter()
        if stream is None:
            result = await self._sandbox.submit(self._request(call))
        else:
            try:
                result = await stream.afinish(call.code[fed:])
            finally:
                stream.close()
        if could and self._gain is not None and result.status is not Status.INFRA:
            self._gain.add(time.perf_counter() - started, early=stream is not None)
        return result, stream is not None

    def drop(self) -> None:
        """The block that has closed need not run."""
        stream = self._stream
        self._next_block()
        if stream is not None:
            stream.close()

    def close(self) -> None:
        """Kill what runs of a block that has not closed."""
        self._closed = True
        self.drop()

    def _next_block(self) -> None:
        self._stream = None
        self._block += 1
        self._looked = self._fed = 0
        self._begin = None

    def _feed(self, block: int, call: DetectedCall) -> None:
        if self._closed or block != self._block or not isinstance(self._sandbox, StreamingSandbox):
            return
        try:
            if self._stream is None:
                self._stream = self._sandbox.open(replace(self._request(call), code=""))
            self._stream.feed(call.code[self._fed :])
            self._fed = len(call.code)
        except SandboxError:  # too many are open, or a queue is full: this block runs as a whole
            if self._stream is not None:
                self._stream.close()
            self._stream, self._fed = None, 0
