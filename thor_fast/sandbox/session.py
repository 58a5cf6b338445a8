"""Sessions: blocks that share one namespace, and the tree of states that they can go back to."""

from __future__ import annotations

import itertools
import math
import os
import signal
import weakref
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox.base import ClosedOnExit
from thor_fast.sandbox.completions import ThreadSink
from thor_fast.sandbox.dialogue import Step
from thor_fast.sandbox.wire import decode_reply, decode_result, encode_step
from thor_fast.types import ExecutionResult, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thor_fast._core import Completion
    from thor_fast.sandbox.dialogue import Host
    from thor_fast.types import ExecutionRequest

__all__ = ["Session", "block_result", "open_session"]

_EXIT_CODES = 1 << 8
_WAIT_STATUSES = 1 << 16

# For the process that watches a block's clock to say that its time is up, before the whole session
# is ended (guest/router.py needs at most half of it).
_GRACE_S = 3.0


class _State:
    """One that is kept, or in the making; no longer once nobody refers to it."""

    def __init__(self, tree: _Tree, before: _State | None) -> None:
        self.number = next(tree.numbers)
        self.before = before
        self._unreachable = tree.unreachable

    def __del__(self) -> None:
        self._unreachable.append(self.number)


class _Tree:
    """What sessions share that come from one another: a process, and the states it keeps.

    They may be used, and dropped, by several threads: what is written here without a lock is
    written by single operations of built-in types.
    """

    def __init__(self, host: Host, dialogue: int, request: ExecutionRequest) -> None:
        self.host = host
        self.request = request
        self.code = request.code  # chooses the tier
        self.numbers = itertools.count()  # of states
        self.handles = itertools.count()  # of sessions
        self.open: set[int] = set()
        self.unreachable: deque[int] = deque()  # states to be ended with the next step
        self._dialogue = dialogue
        self._nobody = _core.CompletionQueue()

    def release(self, handle: int) -> None:
        """One of its sessions is no more."""
        self.open.discard(handle)
        if not self.open:
            self.host._close_dialogue(self._dialogue)  # noqa: SLF001

    def queue(self, step: Step, queue: _core.CompletionQueue) -> int:
        return self.host._step(self._dialogue, step, queue)  # noqa: SLF001

    @contextmanager
    def to_end(self) -> Iterator[list[int]]:
        """The unreachable states, for a step to end; if that is not answered, for the next one."""
        taken: list[int] = []
        with suppress(IndexError):
            while True:
                taken.append(self.unreachable.popleft())
        try:
            yield taken
        except BaseException:
            self.unreachable.extend(taken)  # to end one twice does no harm
            raise

    def end_unreachable(self) -> None:
        """Without waiting for it."""
        if not (self.open and self.unreachable):
            return
        self._nobody.drain()
        # Where the queue is full, the next step does it.
        with suppress(SandboxError), self.to_end() as numbers:
            self.queue(Step(encode_step("end", numbers), self.request, self.code), self._nobody)


@dataclass(frozen=True, slots=True)
class _Block:
    step: Step
    state: _State | None  # the one it will leave, if states are kept


def open_session(
    host: Host, dialogue: int, request: ExecutionRequest, *, rewindable: bool
) -> Session:
    """The first of a new dialogue; its process starts with its first block."""
    tree = _Tree(host, dialogue, request)
    return Session(tree, _State(tree, None) if rewindable else None)


class Session(ClosedOnExit):
    """Blocks that share one namespace, like the cells of a notebook.

    After an exception the namespace is as it was at that point. Tracebacks call the first block
    ``main.py``, the n-th ``block<n>.py``. ``SystemExit`` ends the session, as does a limit: later
    blocks are INFRA.

    With ``rewindable`` each block runs in a fork of the process that keeps the state before it. A
    block that ends its process (``SystemExit``, a crash, its time limit) leaves that state;
    ``rewind`` goes back further, ``fork`` gives a second session that goes on from here. What a
    block leaves running, threads and processes, ends with it.

    Sessions that come from one another share a jail: its files, which are neither rewound nor
    forked, and its limits. Each kept state is a process and counts towards ``max_processes``; a
    block for which there is none left is INFRA. Their blocks run one at a time. They are not
    protected from one another. Each is for one thread at a time; different ones may be used at
    once. The last that is closed ends the process.

    A block's result has no CPU time or memory of the kernel's: both are what the process said.
    Obtained from ``NativeSandbox.session``.
    """

    def __init__(self, tree: _Tree, state: _State | None) -> None:
        self._tree = tree
        self._state = state  # None: none is kept
        self._sink = ThreadSink()
        handle = next(tree.handles)
        tree.open.add(handle)
        self._finalizer = weakref.finalize(self, tree.release, handle)

    def fork(self) -> Session:
        """Another session in the same state; from here on neither sees what the other does.

        Costs nothing until it runs a block. Raises ``SandboxError`` where the session keeps no
        states or is closed.
        """
        return Session(self._tree, self._kept_state())

    def execute(self, code: str, *, timeout_s: float | None = None) -> ExecutionResult:
        """Run the next block; blocks the calling thread. ``timeout_s``: its own limit."""
        with self._block(code, timeout_s) as block:
            ticket = self._tree.queue(block.step, self._sink.queue)
            return self._conclude(block, self._sink.take(ticket))

    async def submit(self, code: str, *, timeout_s: float | None = None) -> ExecutionResult:
        """As :meth:`execute`, without blocking the event loop.

        Cancelling a block that runs ends the session and all that share its jail; one that waits
        for the block of another of them is only taken out.
        """
        with self._block(code, timeout_s) as block:
            done = await self._tree.host._submit_async(  # noqa: SLF001
                lambda queue: self._tree.queue(block.step, queue)
            )
            return self._conclude(block, done)

    def rewind(self, blocks: int = 1) -> None:
        """Go back to the state before the last ``blocks`` blocks; forks stay where they are.

        A block that left no state (``SystemExit``, a crash, a time limit) does not count. Raises
        ``ValueError`` for more than there are, ``SandboxError`` where the session keeps no states
        or is closed.
        """
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"blocks is {blocks!r}, expected at least 1")
        state = self._kept_state()
        for gone_back in range(blocks):
            if state.before is None:
                raise ValueError(
                    f"blocks is {blocks}, expected at most {gone_back}, as many as are kept"
                )
            state = state.before
        self._state = state

    async def arewind(self, blocks: int = 1) -> None:
        """As :meth:`rewind`, which does not block either."""
        self.rewind(blocks)

    def close(self) -> None:
        """End the states that only this session can reach. Safe to call twice."""
        self._finalizer()
        self._state = None
        self._tree.end_unreachable()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise SandboxError("this session is closed")

    def _kept_state(self) -> _State:
        self._check_open()
        if self._state is None:
            raise SandboxError("this session keeps no states: open it with rewindable=True")
        return self._state

    @contextmanager
    def _block(self, code: str, timeout_s: float | None) -> Iterator[_Block]:
        """The next one, while it runs."""
        self._check_open()
        tree, limits = self._tree, self._tree.request
        if timeout_s is not None:
            limits = replace(limits, timeout_s=timeout_s)
        tree.code = tree.code or code
        if self._state is None:
            yield _Block(Step(encode_step("block", code), limits, tree.code), None)
            return
        timeout_s = tree.host._timeout_of(limits)  # noqa: SLF001
        # The router watches the clock, so that the session outlives the block.
        limits = replace(limits, timeout_s=timeout_s + _GRACE_S)
        state = _State(tree, self._state)
        with tree.to_end() as ended:
            numbers = self._state.number, state.number
            data = encode_step("block", *numbers, timeout_s, ended, code)
            yield _Block(Step(data, limits, tree.code), state)

    def _conclude(self, block: _Block, done: Completion) -> ExecutionResult:
        result, goes_on = block_result(done)
        if block.state is not None and goes_on:
            self._state = block.state
        return result


def block_result(done: Completion) -> tuple[ExecutionResult, bool]:
    """And whether there is a state after it. No answer of a hostile block makes this raise."""
    result = decode_result(done)
    match decode_reply(done):
        case None:
            return result, False
        case ("block", int(exit_code), bool(out_of_memory), float(cpu_s)) if (
            0 <= exit_code < _EXIT_CODES and 0 <= cpu_s < math.inf
        ):
            status = result.status if exit_code == 0 else Status.ERROR
            if out_of_memory:
                status = Status.MEMORY
            return replace(result, status=status, exit_code=exit_code, cpu_s=cpu_s), True
        case ("gone", int(wait_status), bool(timed_out)) if _is_wait_status(wait_status):
            return _result_of_gone(result, wait_status, timed_out=timed_out), False
        case ("refused", str(reason)):
            why = f"the block was not run: {reason}; each kept state counts towards max_processes"
        case ("unknown",):
            why = "the block was not run: the process that kept the state before it was killed"
        case _:
            return replace(result, status=Status.ERROR), False
    return replace(result, status=Status.INFRA, error=why), False


def _is_wait_status(number: int) -> bool:
    """Of a process that is over; the snippet could have written any other."""
    return 0 <= number < _WAIT_STATUSES and (os.WIFEXITED(number) or os.WIFSIGNALED(number))


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
