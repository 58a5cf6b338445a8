"""One worker process as its parent sees it: start, ask with a deadline, kill."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time

__all__ = ["GraderError", "GraderProcess"]

# Importing sympy takes half a second on an idle core, and a machine may be very busy.
_START_S = 120.0
_MEMORY_BYTES = 1 << 30  # address space; sympy and numpy take a fifth of it
_MAX_REPLY = 4096
_KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME")


class GraderError(Exception):
    """The process is of no use any more; ``reason``: start, timeout, crash or garbage."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class GraderProcess:
    """Used by one thread at a time. Starting returns at once; the first question waits for it.

    The process gets no environment but what Python needs to start, and its own session, so that
    Ctrl-C in a terminal is the parent's business. It ends when its stdin closes. (PR_SET_PDEATHSIG
    would kill it with the thread that happened to start it.) Raises :class:`GraderError` where the
    system has no process to give.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ready = False
        self._asked = 0
        # A file, since nobody would empty a pipe.
        self._errors = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed in forget
        module = "thor_fast.rewards.verify_worker"
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", module, str(timeout_s), str(_MEMORY_BYTES)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise GraderError("start", str(error)) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)

    def ask(self, reference: str, answer: str) -> tuple[bool | None, str]:
        """Whether they are equal, or ``None`` and the name of the exception that stood against it.

        Raises :class:`GraderError`; then kill it.
        """
        if not self._ready:
            self._wait_until_ready()
        self._asked += 1
        request = {"id": self._asked, "reference": reference, "answer": answer}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise GraderError("crash") from None
        line = self._line(self._timeout_s)
        try:
            reply = json.loads(line)
            number, equal, reason = reply["id"], reply["equal"], reply["reason"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise GraderError("garbage", repr(line)) from None
        if number != self._asked or equal not in (True, False, None):
            raise GraderError("garbage", repr(line))
        return equal, str(reason)

    def stop(self) -> None:
        """End the process; a thread that waits for it gets :class:`GraderError`."""
        self._process.kill()

    def kill(self) -> None:
        """End the process and give back all it holds here."""
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """In a forked child: let go of a process that is the parent's."""
        for file in (self._requests, self._replies, self._errors):
            file.close()
        # Not ours to wait for; unset, the destructor would warn of a process still running.
        self._process.returncode = self._process.returncode or 0

    def _wait_until_ready(self) -> None:
        try:
            line = self._line(_START_S)
        except GraderError as failure:
            raise GraderError("start", f"{failure.reason}; {self._last_words()}") from None
        if line != b"true\n":
            raise GraderError("start", f"first line is {line!r}, expected b'true\\n'")
        self._ready = True

    def _last_words(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        return self._errors.read().decode(errors="replace").strip()

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise GraderError("timeout")
            if not self._poll.poll(left_s * 1000):
                continue
            chunk = os.read(self._replies.fileno(), _MAX_REPLY)
            if not chunk:
                raise GraderError("crash")
            line += chunk
            if len(line) > _MAX_REPLY:
                raise GraderError("garbage", repr(line[:80]))
        return line


def _environment() -> dict[str, str]:
    """What the interpreter needs to find what ours found, and nothing else: no secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),  # noqa: PTH100
        "PYTHONHASHSEED": "0",  # sympy's order of arguments, so the same verdict in every process
        "OPENBLAS_NUM_THREADS": "1",  # each would reserve address space
    }
