"""What every case of the abuse suite shares: running a hostile snippet, then looking at the damage.

A case is contained when the snippet saw exactly what it should (the case asserts that) and when
the same sandbox is none the worse for it (``assert_unharmed``, after every case).
"""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, SandboxLimits, Status

if TYPE_CHECKING:
    from thor_fast.sandbox import ExecutionResult

MIB = 1 << 20
TIMEOUT_S = 5.0

LIMITS = SandboxLimits(timeout_s=TIMEOUT_S, memory_bytes=256 * MIB, max_processes=16)

# Errors by which a system call is refused. Which one is the filter's choice, not a promise.
REFUSED = frozenset({"EPERM", "EACCES", "ENOSYS"})

# Any system call by number: its result, or the name of its errno.
RAW = """
import ctypes, errno, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def raw(number, *args):
    ctypes.set_errno(0)
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
def outcome(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno]
"""


class Abuse:
    """Runs hostile snippets on one sandbox; none may end as a failure of ours or outstay its time.

    ``raw``: put ``raw()`` and ``outcome()`` (:data:`RAW`) and their imports in front; skips the
    case where system call numbers are not those of x86_64.
    """

    def __init__(self, sandbox: NativeSandbox) -> None:
        self.sandbox = sandbox

    def __call__(self, code: str, *, raw: bool = False, **request: Any) -> ExecutionResult:
        if raw and os.uname().machine != "x86_64":
            pytest.skip("its system call numbers are those of x86_64")
        source = (RAW if raw else "") + textwrap.dedent(code)
        result = self.sandbox.execute(ExecutionRequest(source, **request))
        assert result.status is not Status.INFRA, result.error
        assert result.wall_s < request.get("timeout_s", TIMEOUT_S) + 3, "killed in time"
        return result


def assert_unharmed(sandbox: NativeSandbox) -> None:
    """The next snippet succeeds at normal speed, and no process of the last one is left."""
    after = sandbox.execute("print('alive')")
    assert (after.status, after.stdout, after.stderr) == (Status.OK, "alive\n", ""), after
    assert after.wall_s < 1, "one second is a hundred times what it takes on an idle machine"
    deadline = time.monotonic() + 5
    while (left := snippet_processes(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.01)  # namespaces may be torn down after the result was sent
    assert not left


def snippet_processes(owner: int) -> dict[int, str]:
    """Pid and name of processes below ``owner`` that run a snippet's code.

    Those are filtered by seccomp and not pid 1 of their namespace, as zygotes are; templates are
    not filtered. A child that waits for its snippet still has its zygote's control socket, which
    it closes before it runs any code.
    """
    statuses = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "status").read_text().splitlines()
            except OSError:  # it ended while we looked
                continue
            statuses[int(entry.name)] = dict(
                line.split(":\t", 1) for line in lines if ":\t" in line
            )

    def is_below(pid: int) -> bool:
        while pid in statuses and pid != owner:
            pid = int(statuses[pid]["PPid"])
        return pid == owner

    return {
        pid: status["Name"]
        for pid, status in statuses.items()
        if status["Seccomp"] == "2"
        and status["NSpid"].split()[-1] != "1"
        and is_below(pid)
        and control_socket(pid) != control_socket(int(status["PPid"]))
    }


def control_socket(pid: int) -> str:
    """What is open as descriptor 3, where zygotes have theirs."""
    try:
        return str(Path(f"/proc/{pid}/fd/3").readlink())
    except OSError:
        return f"none in {pid}"
