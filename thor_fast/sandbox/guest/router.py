"""The first process of a rewindable session: passes steps to the states, and runs no block.

Loaded from its file inside the guest interpreter: the standard library only.

    owner -> router   ("block", base, number, timeout_s, unreachable, code)
                      ("end", unreachable)
    router -> owner   ["block", exit code, out of memory, CPU seconds]   state `number` is there
                      ["gone", wait status, timed out]                   it is not, the base is
                      ["refused", reason]                                likewise: it was not run
                      ["lost"]       the block has taken its base with it
                      ["unknown"]    there is no such base, or no more: a block has killed it
                      ["ended"]

Each state has a channel of its own (``state.py``), so that only the process that was asked can
answer. One step is in progress at a time. When a block is over, so are all processes that it
started: whoever is left keeps a state, and writes nothing into the next block's output.
"""

from __future__ import annotations

import contextlib
import io
import json
import marshal
import posix
import signal
import sys
from array import array
from time import monotonic, sleep  # before anybody puts other clocks in their place
from typing import TYPE_CHECKING, Any, NoReturn

from .forking import fork_unnoticed
from .state import State

if TYPE_CHECKING:
    from .dialogue import Conversation

_CREDENTIALS_BYTES = 12  # struct ucred: pid, uid, gid
_MOST_SAID = 4096
_TO_BURY_S = 1.0  # for a state to say how its child ended
_SWEEPS, _SWEEP_S = 500, 0.001  # in which a block's processes are outrun


def begin_states(talk: Conversation) -> State:
    """Returns in the process that keeps the state before any block; ours becomes the router."""
    import _socket

    ours, theirs = _channel_pair(_socket)
    pid = fork_unnoticed()
    if pid == 0:
        ours.close()
        return State(theirs.detach())  # in the place of the socket to our owner
    theirs.close()
    return Router(talk, ours, pid).serve()


def _channel_pair(sockets: Any) -> tuple[Any, Any]:
    """Ours, on which the kernel says who speaks, and a state's."""
    pair = [
        sockets.socket(fileno=socket.detach())
        for socket in sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    ]
    pair[0].setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)
    return pair[0], pair[1]


class Router:
    """The states there are, and the step in progress."""

    def __init__(self, talk: Conversation, channel: Any, pid: int) -> None:
        import _socket
        import select

        self._sockets: Any = _socket
        self._talk = talk
        self._poll = select.poll()
        self._readable = select.POLLIN
        self._poll.register(talk.fileno(), self._readable)
        self._channels: dict[int, Any] = {}  # by the state's number
        self._numbers: dict[int, int] = {}  # by the channel's descriptor
        self._pids: dict[int, int] = {0: pid}  # of the states that are there, by number
        self._base = self._number = -1  # of the step in progress, if any
        self._deadline: float | None = None
        self._begun = self._timed_out = False
        self._add(0, channel)

    def serve(self) -> NoReturn:
        while True:
            left = None if self._deadline is None else self._deadline - monotonic()
            events = self._poll.poll(None if left is None else max(left, 0) * 1000)
            if not events:
                self._out_of_time()
            for fd, _ in events:
                if fd == self._talk.fileno():
                    self._take_step()
                elif fd in self._numbers:
                    self._listen(self._numbers[fd])

    def _take_step(self) -> None:
        fd = self._talk.receive_file()
        with io.FileIO(fd) as file:
            kind, *step = marshal.loads(file.readall())  # noqa: S302  (from our owner)
            if kind == "end":
                self._end_all(step[0])
                self._talk.answer("ended")
            else:
                base, number, timeout_s, unreachable, _ = step
                self._end_all(unreachable)
                file.seek(0)
                self._start(base, number, timeout_s, fd)

    def _start(self, base: int, number: int, timeout_s: float, file: int) -> None:
        self._base, self._number = base, number
        self._begun = self._timed_out = False
        self._deadline = monotonic() + timeout_s
        if base not in self._channels:
            self._finish("unknown")
            return
        try:
            ours, theirs = _channel_pair(self._sockets)
        except OSError as error:
            self._finish("refused", f"socketpair: {error}")
            return
        self._add(number, ours)
        handles = (self._sockets.SOL_SOCKET, self._sockets.SCM_RIGHTS)
        fds = array("i", (file, theirs.fileno()))
        try:
            self._channels[base].sendmsg(
                [b"%d" % number], [(*handles, fds)], self._sockets.MSG_DONTWAIT
            )
        except OSError:  # it is dead, or does not listen
            self._end(base)
            self._finish("unknown")
        finally:
            theirs.close()

    def _listen(self, number: int) -> None:
        data, ancillary, _, _ = self._channels[number].recvmsg(
            _MOST_SAID, self._sockets.CMSG_SPACE(_CREDENTIALS_BYTES)
        )
        if not data:
            self._forget(number)
        elif number == self._number:
            self._hear_block(data, ancillary)
        elif not self._hear_state(number, data):
            self._end(number)  # it spoke without being asked
        # The block may live on after its base, but then nobody can say how it ends.
        if self._base >= 0 and not {self._base, self._number} & self._channels.keys():
            self._finish("lost" if self._begun else "unknown")

    def _hear_block(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        if data == b'["begun"]' and not self._begun:
            self._begun = True
            return
        if not data.startswith(b'["block", '):
            self._finish("garbled")
            return
        self._pids[self._number] = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        self._answer(data)

    def _hear_state(self, number: int, data: bytes) -> bool:
        """Whether it was something that a state may say."""
        try:
            kind, child, what = json.loads(data)
        except (ValueError, TypeError, RecursionError):
            return False
        asked = number == self._base and child == self._number
        if asked and kind == "gone":
            self._finish(kind, what, self._timed_out)
        elif asked and kind == "refused":
            self._finish(kind, what)
        else:
            return bool(kind == "gone")  # its child was a state, which has been ended
        return True

    def _out_of_time(self) -> None:
        if self._timed_out:  # and nobody says what became of it
            self._end(self._base)
            self._finish("lost" if self._begun else "unknown")
            return
        self._timed_out = True
        self._deadline = monotonic() + _TO_BURY_S
        self._sweep()

    def _finish(self, *answer: Any) -> None:
        """The step has made no state."""
        self._forget(self._number)
        self._answer(json.dumps(answer).encode())

    def _answer(self, answer: bytes) -> None:
        self._base = self._number = -1
        self._deadline = None
        self._sweep()
        self._talk.send(answer)

    def _add(self, number: int, channel: Any) -> None:
        self._channels[number] = channel
        self._numbers[channel.fileno()] = number
        self._poll.register(channel.fileno(), self._readable)

    def _end_all(self, numbers: list[int]) -> None:
        for number in numbers:
            self._end(number)

    def _end(self, number: int) -> None:
        """Also one that has ended."""
        if number in self._pids:
            with contextlib.suppress(OSError):
                posix.kill(self._pids[number], signal.SIGKILL)
        self._forget(number)

    def _forget(self, number: int) -> None:
        self._pids.pop(number, None)
        channel = self._channels.pop(number, None)
        if channel is not None:
            self._poll.unregister(channel.fileno())
            del self._numbers[channel.fileno()]
            channel.close()

    def _sweep(self) -> None:
        """Kill every process but those that keep states; if they outrun us, the session ends.

        Who has been killed runs no more, and forks no more, though it may take a while to be gone.
        """
        spared = {1, posix.getpid(), *self._pids.values()}
        for _ in range(_SWEEPS):
            left = {int(name) for name in posix.listdir("/proc") if name.isdigit()} - spared
            if not left:
                return
            for pid in left:
                with contextlib.suppress(OSError):
                    posix.kill(pid, signal.SIGKILL)
            spared |= left
            sleep(_SWEEP_S)
        posix._exit(1)  # noqa: SLF001
