"""Streams and sessions: one process that is asked several things, one after another."""

from __future__ import annotations

import os
import re
import signal
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

__all__ = ["Session", "Step", "Stream"]


class _Host(Protocol):
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


class _Dialogue(ClosedOnExit):
    """Open until closed; closing kills the process. Not for several threads at once."""

    def __init__(self, host: _Host, dialogue: int, request: ExecutionRequest) -> None:
        self._host = host
        self._dialogue = dialogue
        self._request = request
        self._sink = ThreadSink()
        self._code = request.code
        self._finalizer = weakref.finalize(self, host._close_dialogue, dialogue)  # noqa: SLF001

    def close(self) -> None:
        """Kill the process and free what it holds. Safe to call twice."""
        self._finalizer()

    def _queue(
        self,
        step: tuple[str | float, ...],
        queue: _core.CompletionQueue,
        limits: ExecutionRequest | None = None,
    ) -> int:
        if not self._finalizer.alive:
            raise SandboxError(f"this {type(self).__name__.lower()} is closed")
        asked = Step(encode_step(*step), limits or self._request, self._code)
        return self._host._step(self._dialogue, asked, queue)  # noqa: SLF001


# Lines that may stand before the first that does something; imports among them choose the tier.
_PREAMBLE = re.compile(r"(?:[ \t]*(?:#.*|(?:import|from)\b.*)?\r?\n)*\Z")


class Stream(_Dialogue):
    """A block that runs while its text arrives, statement by statement.

    The result is exactly that of running the whole text at once: after an exception nothing more
    runs, a late ``SyntaxError`` discards what was printed before it, tracebacks show the right
    lines. Time between statements does not count towards the limits. What a statement cannot know,
    such as the time that passes while the next one is written, is in ``guest/statements.py``.

    Obtained from ``NativeSandbox.open``; ``finish`` closes it.
    """

    def __init__(self, host: _Host, dialogue: int, request: ExecutionRequest) -> None:
        super().__init__(host, dialogue, request)
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
        # Nothing is complete before its line is.
        end = self._text.rfind("\n") + 1
        if end <= self._sent or (self._sent == 0 and _PREAMBLE.match(self._text, 0, end)):
            return
        if self._sent == 0:
            self._code = self._text
        self._queue(("feed", self._text[self._sent : end]), self._sink.queue)
        self._sent = end

    def finish(self) -> ExecutionResult:
        """There is no more text: run what is left, wait for the end, close."""
        with self:
            last = self._queue(self._rest(), self._sink.queue)
            while not self._done or self._done[-1][0] != last:
                self._done.extend(self._sink.wait())
        verdict, check = self._verdict()
        if check is not None and not _is_clean(self._host.execute(check)):
            verdict = None
        return self._host.execute(self._whole()) if verdict is None else verdict

    async def afinish(self) -> ExecutionResult:
        """As :meth:`finish`, without blocking the event loop."""
        with self:
            last = await self._host._submit_async(  # noqa: SLF001
                lambda queue: self._queue(self._rest(), queue)
            )
            self._done.extend(self._sink.queue.drain())
            self._done.append(last)
        verdict, check = self._verdict()
        if check is not None and not _is_clean(await self._host.submit(check)):
            verdict = None
        return await self._host.submit(self._whole()) if verdict is None else verdict

    def _rest(self) -> tuple[str | float, ...]:
        if self._sent == 0:
            self._code = self._text
        return "finish", self._text[self._sent :]

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


class Session(_Dialogue):
    """Blocks that share one namespace, like the cells of a notebook.

    After an exception the namespace is as it was at that point. Tracebacks call the first block
    ``main.py``, the n-th ``block<n>.py``. ``SystemExit`` ends the session, as does a limit: later
    blocks are INFRA.

    With ``rewindable`` each block runs in a fork of the process before it. A block that ends its
    process (``SystemExit``, a crash, its time limit) leaves the state before it; ``rewind`` goes
    back further. Threads do not survive into the next block. The blocks' processes count towards
    ``max_processes``; files are not rewound.

    A block's result has no CPU time or memory of the kernel's: both are what the process said.
    Obtained from ``NativeSandbox.session``.
    """

    def __init__(
        self, host: _Host, dialogue: int, request: ExecutionRequest, *, rewindable: bool
    ) -> None:
        super().__init__(host, dialogue, request)
        self._rewindable = rewindable

    def execute(self, code: str, *, timeout_s: float | None = None) -> ExecutionResult:
        """Run the next block; blocks the calling thread. ``timeout_s``: its own limit."""
        step, limits = self._block(code, timeout_s)
        return _block_result(self._sink.take(self._queue(step, self._sink.queue, limits)))

    async def submit(self, code: str, *, timeout_s: float | None = None) -> ExecutionResult:
        """As :meth:`execute`, without blocking the event loop. Cancelling ends the session."""
        step, limits = self._block(code, timeout_s)
        return _block_result(
            await self._host._submit_async(  # noqa: SLF001
                lambda queue: self._queue(step, queue, limits)
            )
        )

    def rewind(self, blocks: int = 1) -> None:
        """Go back to the state before the last ``blocks`` blocks.

        Raises ``ValueError`` for more than there are, ``SandboxError`` where the session keeps no
        states or is over.
        """
        _check_rewound(blocks, self._sink.take(self._queue(self._back(blocks), self._sink.queue)))

    async def arewind(self, blocks: int = 1) -> None:
        """As :meth:`rewind`, without blocking the event loop."""
        done = await self._host._submit_async(  # noqa: SLF001
            lambda queue: self._queue(self._back(blocks), queue)
        )
        _check_rewound(blocks, done)

    def _block(
        self, code: str, timeout_s: float | None
    ) -> tuple[tuple[str | float, ...], ExecutionRequest]:
        limits = self._request if timeout_s is None else replace(self._request, timeout_s=timeout_s)
        self._code = self._code or code
        inner = self._host._timeout_of(limits)  # noqa: SLF001
        if self._rewindable:
            # The process before it watches the clock, so that the session outlives the block.
            limits = replace(limits, timeout_s=inner + _GRACE_S)
        return ("block", code, inner), limits

    def _back(self, blocks: int) -> tuple[str | float, ...]:
        if not self._rewindable:
            raise SandboxError("this session keeps no states: open it with rewindable=True")
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"blocks is {blocks!r}, expected at least 1")
        return "rewind", blocks, 0.0


_GRACE_S = 2.0


def _block_result(done: Completion) -> ExecutionResult:
    result = decode_result(done)
    match decode_reply(done):
        case None:
            return result
        case ("block", int(exit_code), bool(out_of_memory), int() | float() as cpu_s):
            status = result.status if exit_code == 0 else Status.ERROR
            if out_of_memory:
                status = Status.MEMORY
            return replace(result, status=status, exit_code=exit_code, cpu_s=float(cpu_s))
        case ("gone", int(wait_status), bool(timed_out)):
            return _result_of_gone(result, wait_status, timed_out=timed_out)
        case _:
            return replace(result, status=Status.ERROR, error="")


def _result_of_gone(
    result: ExecutionResult, wait_status: int, *, timed_out: bool
) -> ExecutionResult:
    """Of a block whose process ended while the session goes on."""
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        status = Status.KILLED if number == signal.SIGSYS else Status.ERROR
        if timed_out or number == signal.SIGXCPU:
            status = Status.TIMEOUT
        return replace(result, status=status, signal=number)
    exit_code = os.waitstatus_to_exitcode(wait_status)
    status = result.status if exit_code == 0 else Status.ERROR
    return replace(result, status=status, exit_code=exit_code)


def _check_rewound(blocks: int, done: Completion) -> None:
    match decode_reply(done):
        case ("rewound", int()):
            return
        case ("depth", int(depth)):
            raise ValueError(f"blocks is {blocks}, expected at most {depth}, as many as are kept")
        case _:
            raise SandboxError(f"the session is over: {decode_result(done).error}")
