"""A process that is asked several things, one after another: the guest's side.

Loaded from its file inside the guest interpreter: the standard library only.

Steps come on a socket, each a file with a marshalled tuple; answers go back as JSON.
What an answer says is in the hands of the code that ran here: whoever reads it must not rely on it
for more than the fate of that code.
"""

from __future__ import annotations

import json
import marshal
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from .session import Session
from .statements import Outcome, Statements

if TYPE_CHECKING:
    from collections.abc import Callable

    Judge = Callable[[BaseException | None], int]
    """Prints what is to be printed of an exception; gives the exit code."""

# The extension modules that only a dialogue needs are imported when one begins: mapped into every
# snippet's process, they would cost all of them more than they save a few.

_INT_BYTES = 4  # of a C int: a descriptor


class Conversation:
    """Our end of the socket."""

    def __init__(self, fd: int) -> None:
        import _socket

        self._socket = _socket.socket(fileno=fd)
        self._room = _socket.CMSG_SPACE(_INT_BYTES)

    def receive(self) -> tuple[Any, ...]:
        """The next step. There is no life after the other end has closed."""
        data, ancillary, _, _ = self._socket.recvmsg(4096, self._room)
        if not data or not ancillary:
            os._exit(0)
        with open(int.from_bytes(ancillary[0][2], sys.byteorder), "rb") as file:  # noqa: PTH123
            step: tuple[Any, ...] = marshal.loads(file.read())  # noqa: S302  (from our owner)
        return step

    def answer(self, *values: Any) -> None:
        self._socket.send(json.dumps(values).encode())


def serve_stream(talk: Conversation, namespace: dict[str, Any], judge: Judge) -> int:
    """Run one block as its text arrives; its exit code."""
    block = Statements(namespace)
    while True:
        kind, text = talk.receive()
        if kind == "feed":
            block.feed(text)
            talk.answer("fed")
            continue
        ending = block.finish(text)
        if ending.outcome is Outcome.DONE:
            return judge(ending.error)
        # Only a fresh process can make it as if nothing had run.
        talk.answer(ending.outcome.value)


def serve_session(
    talk: Conversation, namespace: dict[str, Any], judge: Judge, *, rewindable: bool
) -> int:
    """Run block after block in one namespace; the exit code of the one that ended it."""
    session = Session(namespace)
    chain = _Chain(talk) if rewindable else None
    while True:
        kind, value, timeout_s = talk.receive()
        if kind == "rewind":
            if chain is not None:
                chain.rewind(value)
            continue
        if chain is not None and not chain.enter(timeout_s):
            continue  # the block ran in a child, which is gone, and so is what it did
        started = time.process_time()
        error = session.open().finish(value).error
        exit_code = judge(error)
        if isinstance(error, SystemExit):
            return exit_code
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        if chain is not None:
            chain.leave_block()
        out_of_memory = isinstance(error, MemoryError)
        talk.answer("block", exit_code, out_of_memory, time.process_time() - started)


class _Chain:
    """Each block runs in a child of the process that ran the one before it.

    So the parents are the states to go back to. They wait, and only the last process serves.
    """

    def __init__(self, talk: Conversation) -> None:
        import mmap

        self._talk = talk
        self._depth = 0
        self._over = -1  # where to say that the block is over
        self._to_rewind = mmap.mmap(-1, mmap.PAGESIZE)  # shared by the whole chain

    def enter(self, timeout_s: float) -> bool:
        """Go on in a child. False: in the parent, once the child is gone."""
        random = sys.modules.get("random")
        state = random.getstate() if random is not None else None
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid > 0:
            os.close(write_end)
            self._wait(pid, read_end, timeout_s)
            os.close(read_end)
            return False
        os.close(read_end)
        os.setpgid(0, 0)
        self._over = write_end
        self._depth += 1
        if random is not None:
            random.setstate(state)  # a fork is reseeded, but to the session this is none
        return True

    def leave_block(self) -> None:
        """The block is over, its process goes on: nobody needs to watch the clock."""
        os.write(self._over, b".")
        os.close(self._over)

    def rewind(self, blocks: int) -> None:
        """End so many of the chain's last processes."""
        if blocks > self._depth:
            self._talk.answer("depth", self._depth)
        else:
            self._end(blocks)

    def _end(self, blocks: int) -> NoReturn:
        self._set(blocks)
        os._exit(0)

    def _wait(self, pid: int, over: int, timeout_s: float) -> None:
        import select

        watch = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        poll.register(over, select.POLLIN)
        timed_out = not poll.poll(timeout_s * 1000)
        if timed_out:
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(watch)
        left = self._get()
        if left > 1:
            self._end(left - 1)
        if left == 1:
            self._set(0)
            self._talk.answer("rewound", self._depth)
        else:
            self._talk.answer("gone", status, timed_out)

    def _set(self, blocks: int) -> None:
        self._to_rewind[:_INT_BYTES] = blocks.to_bytes(_INT_BYTES, sys.byteorder)

    def _get(self) -> int:
        return int.from_bytes(self._to_rewind[:_INT_BYTES], sys.byteorder)
