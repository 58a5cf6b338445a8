"""A process that keeps the state of a session, as it was after one of its blocks.

Loaded from its file inside the guest interpreter: the standard library only.

It waits on its channel. A step that comes there brings a descriptor with the block and the channel
of the state to be made. The process forks; the child runs the block, answers on the new channel,
and waits there in turn. So a state can be gone on from any number of times, and is never changed:
while it waits it has one thread, and takes no signals.

    router -> state   number of the new state   + the step's file, + the new state's channel
    state -> router   ["begun"]    by the child: if it ends from here on, its block has ended it
                      ["block", exit code, out of memory, CPU seconds]   once it has been made
                      ["gone", number, wait status]     a child ended, whatever it kept
                      ["refused", number, reason]       there is no child of that number
"""

from __future__ import annotations

import io
import json
import marshal
import posix  # not os: what a block has replaced there is not what we call
import signal
import sys
import warnings
from array import array
from typing import TYPE_CHECKING, Any, NoReturn

from .forking import fork_unnoticed

if TYPE_CHECKING:
    from collections.abc import Callable

_TRIES, _RETRY_MS = 100, 5  # what was killed lives on until its parent has waited for it
CHANNEL_FD = 3  # the same in every block, so that the files a block opens have the same numbers


class State:
    """The process we are in; ``next_block`` returns in its children."""

    def __init__(self, channel: int) -> None:
        import _socket
        import select

        _become_channel(channel)
        self._channel = _socket.socket(fileno=CHANNEL_FD)
        self._room = _socket.CMSG_SPACE(2 * array("i").itemsize)
        self._poll: Callable[[], Any] = select.poll
        self._readable = select.POLLIN
        self._tries = 0  # left to fork for the step in progress

    def next_block(self, *answer: Any) -> str:
        """Answer for the last block and wait; returns the next block, in the child to run it."""
        restore_signals = _block_signals()
        if answer:
            _shed_threads()
            self._send(*answer)
        poll = self._poll()
        poll.register(CHANNEL_FD, self._readable)
        children: dict[int, tuple[int, int]] = {}
        number, fds = -1, [0]
        while True:
            for fd, _ in poll.poll(_RETRY_MS if self._tries else None):
                if fd == CHANNEL_FD:
                    number, fds = self._receive()
                    self._tries = _TRIES
                else:
                    poll.unregister(fd)
                    self._bury(fd, *children.pop(fd))
            pid = self._fork(number, fds) if self._tries else -1
            if pid == 0:
                for child in children:
                    posix.close(child)
                self._send("begun")
                restore_signals()
                return _read_block(fds[0])
            if pid > 0:
                child = posix.pidfd_open(pid)
                children[child] = (pid, number)
                poll.register(child, self._readable)

    def _receive(self) -> tuple[int, list[int]]:
        data, ancillary, _, _ = self._channel.recvmsg(64, self._room)
        if not data:
            posix._exit(0)  # noqa: SLF001
        fds = array("i")
        for _, _, handles in ancillary:
            fds.frombytes(handles[: len(handles) // fds.itemsize * fds.itemsize])
        return int(data), fds.tolist()

    def _fork(self, number: int, fds: list[int]) -> int:
        """As ``os.fork``, with the new channel in the child's place of ours; -1: there is none."""
        reason, pid = "the last block has used up its descriptors", -1
        self._tries -= 1
        try:
            if len(fds) == 2:
                pid = fork_unnoticed()
        except BlockingIOError as error:  # as many processes as there may be, some of them dying
            if self._tries:
                return -1
            reason = f"fork: {error}"
        except OSError as error:
            reason = f"fork: {error}"
        self._tries = 0
        if pid == 0:
            _become_channel(fds[1])
            posix.setpgid(0, 0)  # what a block does to its process group, it does not do to us
            return 0
        for fd in fds:
            posix.close(fd)
        if pid < 0:
            self._send("refused", number, reason)
        return pid

    def _bury(self, pidfd: int, pid: int, number: int) -> None:
        _, status = posix.waitpid(pid, 0)
        posix.close(pidfd)
        self._send("gone", number, status)

    def _send(self, *values: Any) -> None:
        self._channel.send(json.dumps(values).encode())


def _become_channel(fd: int) -> None:
    posix.dup2(fd, CHANNEL_FD, inheritable=False)
    posix.close(fd)


def _read_block(fd: int) -> str:
    with io.FileIO(fd) as file:
        block: str = marshal.loads(file.readall())[-1]  # noqa: S302  (from our owner)
    return block


def _block_signals() -> Callable[[], None]:
    """A block's handlers would run, and change the state; what is returned undoes it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    on_child = signal.getsignal(signal.SIGCHLD)
    # Ignored, it would have the kernel throw away how a child ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def restore() -> None:
        if on_child is not None:
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return restore


def _shed_threads() -> None:
    """Go on in a fork if the block has started threads: they stay behind, and end."""
    if len(posix.listdir("/proc/self/task")) == 1:
        return
    # From Python 3.12 on it warns about just this.
    module: Any = warnings
    filters, module.filters = module.filters, [("ignore", None, Warning, None, 0)]
    try:
        pid = fork_unnoticed()
    except OSError as error:
        print(f"the state after this block cannot be kept: fork: {error}", file=sys.stderr)
        posix._exit(1)  # noqa: SLF001
    if pid > 0:
        _await_end(pid)
    module.filters = filters


def _await_end(pid: int) -> NoReturn:
    """For whoever answers in our stead to be heard: then the router ends us."""
    posix.waitpid(pid, 0)
    posix._exit(1)  # noqa: SLF001
