"""Streams: one process that is given a block in pieces, while it is being written."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.sandbox.completions import ThreadSink
from thor_fast.sandbox.wire import decode_reply, decode_result, encode_step
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from thor_fast._core import Completion

__all__ = ["Host", "Step", "Stream"]


class Host(Protocol):
    """What of the sandbox a dialogue uses."""

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult: ...
    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult: ...
    def _step(self, dialogue: int, step: Step, queue: _core.CompletionQueue) -> int: ...
    async def _submit_async(self, submit: Callable[[_core.CompletionQueue], int]) -> Completion: ...
    def _close_dialogue(self, dialogue: int) -> None: ...
    def _timeout_of(self, request: ExecutionRequest) -> float: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What the process is asked; ``code`` chooses the tier of the first one."""

    data: bytes
    limits: ExecutionRequest
    code: str


# Lines that may stand before the first that does something; imports among them choose the tier.
_PREAMBLE = re.compile(r"(?:[ \t]*(?:#.*|(?:import|from)\b.*)?\r?\n)*\Z")
# The start of a line that shows that the compound statement above it is over.
_NEXT_STATEMENT = re.compile(r"(?!(?:import|from)\b)\w+\W")


class Stream(ClosedOnExit):
    """A block that runs while its text arrives, statement by statement.

    The result is exactly that of running the whole text at once: after an exception nothing more
    runs, a late ``SyntaxError`` discards what was printed before it, tracebacks show the right
    lines. Time between statements does not count towards the limits. What a statement cannot know,
    such as the time that passes while the next one is written, is in ``guest/statements.py``.

    Obtained from ``NativeSandbox.open``; ``finish`` closes it. Not for several threads at once.
    """

    def __init__(self, host: Host, dialogue: int, request: ExecutionRequest) -> None:
        self._host = host
        self._dialogue = dialogue
        self._request = request
        self._sink = ThreadSink()
        self._code = ""  # chooses the tier
        self._finalizer = weakref.finalize(self, host._close_dialogue, dialogue)  # noqa: SLF001
        self._text = ""
        self._sent = 0
        self._done: list[Completion] = []

    def feed(self, text: str) -> None:
        """Add text, of any length; returns at once.

        Raises ``SandboxError`` once closed, or when the sandbox's queue is full: then the text is
        kept, and goes with the next call.
        """
        if not self._finalizer.alive:
            raise SandboxError("this stream is closed")
        self._text = (self._text + text).removeprefix("\ufeff")
        # Nothing is complete before its line is, or even the start of the next one.
        end = self._text.rfind("\n") + 1
        if self._sent == 0 and _PREAMBLE.match(self._text, 0, end):
            return
        if self._sent <= end and _NEXT_STATEMENT.match(self._text, end):
            end = len(self._text)
        if end <= self._sent:
            return
        if self._sent == 0:
            self._code = self._text
        self._queue("feed", self._text[self._sent : end], self._sink.queue)
        self._sent = end

    def finish(self, rest: str = "") -> ExecutionResult:
        """There is no text after ``rest``: run what is left, wait for the end, close."""
        with self:
            self._text = (self._text + rest).removeprefix("\ufeff")
            last = self._queue_rest(self._sink.queue)
            while not self._done or self._done[-1][0] != last:
                self._done.extend(self._sink.wait())
        verdict, check = self._verdict()
        if check is not None and not _is_clean(self._host.execute(check)):
            verdict = None
        return self._host.execute(self._whole()) if verdict is None else verdict

    async def afinish(self, rest: str = "") -> ExecutionResult:
        """As :meth:`finish`, without blocking the event loop."""
        with self:
            self._text = (self._text + rest).removeprefix("\ufeff")
            last = await self._host._submit_async(self._queue_rest)  # noqa: SLF001
            self._done.extend(self._sink.queue.drain())
            self._done.append(last)
        verdict, check = self._verdict()
        if check is not None and not _is_clean(await self._host.submit(check)):
            verdict = None
        return await self._host.submit(self._whole()) if verdict is None else verdict

    def close(self) -> None:
        """Kill the process and free what it holds. Safe to call twice."""
        self._finalizer()

    def _queue_rest(self, queue: _core.CompletionQueue) -> int:
        if self._sent == 0:
            self._code = self._text
        return self._queue("finish", self._text[self._sent :], queue)

    def _queue(self, kind: str, text: str, queue: _core.CompletionQueue) -> int:
        if not self._finalizer.alive:
            raise SandboxError("this stream is closed")
        step = Step(encode_step(kind, text), self._request, self._code)
        return self._host._step(self._dialogue, step, queue)  # noqa: SLF001

    def _verdict(self) -> tuple[ExecutionResult | None, ExecutionRequest | None]:
        """The result, or ``None`` where only running the whole block anew gives it.

        With it a request to make first: a process that ended before it had all of the text may have
        run what, as it turns out, does not compile.
        """
        for done in self._done:
            if decode_reply(done) is not None:
                continue
            result = decode_result(done)
            early = done is not self._done[-1] and result.status is not Status.INFRA
            code = f"compile({self._text!r}, 'main.py', 'exec', dont_inherit=True)"
            return result, replace(self._request, code=code, collect=()) if early else None
        return None, None

    def _whole(self) -> ExecutionRequest:
        return replace(self._request, code=self._text)


def _is_clean(compiled: ExecutionResult) -> bool:
    """It compiles, and without a warning, which the whole block would have shown first."""
    return compiled.status is Status.OK and not compiled.stderr
