"""A process that is asked several things, one after another: the guest's side.

Loaded from its file inside the guest interpreter: the standard library only.

Steps come on a socket, each a file with a marshalled tuple; answers go back as JSON.
What an answer says is in the hands of the code that ran here: whoever reads it must not rely on it
for more than the fate of that code.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import posix  # not os: what a block has replaced there is not what we call
import sys
from time import process_time  # before anybody puts another clock in its place
from typing import TYPE_CHECKING, Any

from .router import begin_states
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
        """The next step."""
        with io.FileIO(self.receive_file()) as file:
            step: tuple[Any, ...] = marshal.loads(file.readall())  # noqa: S302  (from our owner)
        return step

    def receive_file(self) -> int:
        """The next step's descriptor. There is no life after the other end has closed."""
        data, ancillary, _, _ = self._socket.recvmsg(4096, self._room)
        if not data or not ancillary:
            posix._exit(0)  # noqa: SLF001
        return int.from_bytes(ancillary[0][2], sys.byteorder)

    def answer(self, *values: Any) -> None:
        self.send(json.dumps(values).encode())

    def send(self, answer: bytes) -> None:
        self._socket.send(answer)

    def fileno(self) -> int:
        return self._socket.fileno()

    def leave(self) -> None:
        """No more is said. A socket that is merely forgotten makes Python warn, if asked to."""
        self._socket.detach()


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
            talk.leave()
            return judge(ending.error)
        # Only a fresh process can make it as if nothing had run.
        talk.answer(ending.outcome.value)


def serve_session(talk: Conversation, namespace: dict[str, Any], judge: Judge) -> int:
    """Run block after block in one namespace; the exit code of the one that ended it."""
    session = Session(namespace)
    while True:
        _, code = talk.receive()
        exit_code, answer = _run_block(session, code, judge)
        if not answer:
            return exit_code
        talk.answer(*answer)


def serve_states(talk: Conversation, namespace: dict[str, Any], judge: Judge) -> int:
    """As :func:`serve_session`, each block in a fork of the process that keeps the state before it.

    Returns in the process of a block that has ended it.
    """
    state = begin_states(talk)
    session = Session(namespace)
    answer: tuple[Any, ...] = ()
    while True:
        code = state.next_block(*answer)
        exit_code, answer = _run_block(session, code, judge)
        if not answer:
            return exit_code


def _run_block(session: Session, code: str, judge: Judge) -> tuple[int, tuple[Any, ...]]:
    """The exit code, and what to answer; nothing where this process is to end."""
    pid, started = posix.getpid(), process_time()
    error = session.open().finish(code).error
    exit_code = judge(error)
    if isinstance(error, SystemExit) or posix.getpid() != pid:  # a fork of the block's own
        return exit_code, ()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the block may have put anything there
            stream.flush()
    out_of_memory = isinstance(error, MemoryError)
    return exit_code, ("block", exit_code, out_of_memory, process_time() - started)
