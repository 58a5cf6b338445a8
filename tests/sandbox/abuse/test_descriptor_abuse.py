"""File descriptors: all closed, all used up, reopened, swapped, and terminals behind them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import ExecutionRequest, Status

from .harness import REFUSED

if TYPE_CHECKING:
    from thor_fast.sandbox import NativeSandbox

    from .harness import Abuse


@pytest.mark.parametrize(
    ("code", "status"),
    [
        pytest.param(
            "import os\nfor fd in (0, 1, 2): os.close(fd)", Status.OK, id="standard-streams"
        ),
        pytest.param("import os\nos.closerange(0, 256)\nos._exit(0)", Status.OK, id="all"),
        pytest.param(
            "import os\nos.closerange(0, 256)\nraise ValueError", Status.ERROR, id="all-then-raise"
        ),
        pytest.param("import os\nos.close(1)\nprint('lost')", Status.ERROR, id="stdout-then-print"),
        pytest.param(
            "import os\nos.dup2(0, 1)\nprint('into stdin')", Status.ERROR, id="stdout-is-stdin"
        ),
        pytest.param(
            "import os\nos.close(1)\nos.open('f', os.O_RDWR | os.O_CREAT)\nprint('x')",
            Status.OK,
            id="stdout-is-a-file",
        ),
    ],
)
def test_closed_or_swapped(abuse: Abuse, code: str, status: Status) -> None:
    """The ending is that of plain Python; nothing of ours depends on those descriptors."""
    result = abuse(code)
    assert (result.status, result.stdout) == (status, "")


def test_all_descriptors_used_up(abuse: Abuse) -> None:
    """At RLIMIT_NOFILE nothing can be opened, not even by whoever prints the traceback."""
    result = abuse("""
        import os
        kept = []
        while True: kept.append(os.open('/dev/null', os.O_RDONLY))
    """)
    assert (result.status, "Too many open files" in result.stderr) == (Status.ERROR, True)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/proc/self/exe", id="the-interpreter-CVE-2019-5736"),
        pytest.param("/proc/self/fd/%d", id="a-read-only-descriptor-reopened"),
        pytest.param("/proc/self/map_files", id="mapped-files"),
        pytest.param("/proc/self/root/usr/bin/env", id="through-root"),
        pytest.param("/proc/self/cwd/../../usr/bin/env", id="through-cwd"),
        pytest.param("/proc/self/task/%d/root/bin/sh", id="through-task"),
    ],
)
def test_magic_links_do_not_widen_access(abuse: Abuse, path: str) -> None:
    """A magic link opens the file anew: the mount's read-only flag must hold there too."""
    result = abuse(
        f"""
        path = {path!r}
        if 'fd' in path: path %= os.open(os.__file__, os.O_RDONLY)
        if 'task' in path: path %= os.getpid()
        print(outcome(os.open, path, os.O_RDWR), outcome(os.open, path, os.O_WRONLY | os.O_TRUNC))
        """,
        raw=True,
    )
    errors = set(result.stdout.split())
    assert errors <= {"EROFS", "EACCES", "EPERM", "ETXTBSY", "EISDIR", "ENOENT"}


@pytest.mark.parametrize(
    "request_number",
    [
        pytest.param("0x5412", id="TIOCSTI-CVE-2017-5226"),
        pytest.param("0x5412 | 1 << 32", id="TIOCSTI-high-bits-CVE-2019-7303"),
        pytest.param("0x541C", id="TIOCLINUX-CVE-2023-1523"),
        pytest.param("0x540E", id="TIOCSCTTY"),
        pytest.param("0x5410", id="TIOCSPGRP"),
        pytest.param("0x5414", id="TIOCSWINSZ"),
        pytest.param("0x541D", id="TIOCCONS"),
        pytest.param("0x5423", id="TIOCSETD-line-discipline-CVE-2017-2636"),
        pytest.param("0x40046602", id="FS_IOC_SETFLAGS-immutable"),
        pytest.param("0x40049409", id="FICLONE"),
        pytest.param("0xC0045878", id="FIFREEZE-of-the-file-system"),
        pytest.param("0xB701", id="NS_GET_USERNS"),
        pytest.param("0x8933", id="SIOCGIFINDEX"),
        pytest.param("0x5452", id="FIOASYNC"),
    ],
)
def test_ioctl_is_refused(abuse: Abuse, request_number: str) -> None:
    """Input injected into a terminal, and what else ioctl carries on descriptors one has."""
    result = abuse(
        f"""
        fds = [0, 1, 2, os.open('/tmp', os.O_RDONLY), os.open('/proc/self/ns/user', os.O_RDONLY)]
        print(*{{raw(16, fd, {request_number}, b'x' * 64) for fd in fds}})
        """,
        raw=True,
    )
    assert set(result.stdout.split()) <= REFUSED | {"ENOTTY"}


def test_no_terminal(abuse: Abuse) -> None:
    """No controlling terminal, and none to be had."""
    result = abuse(
        """
        print(outcome(os.open, '/dev/tty', os.O_RDWR), outcome(os.open, '/dev/ptmx', os.O_RDWR),
              outcome(os.open, '/dev/pts/0', os.O_RDWR), os.isatty(0), os.isatty(1), os.isatty(2))
        """,
        raw=True,
    )
    assert result.stdout == "ENOENT ENOENT ENOENT False False False\n"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("fcntl.flock, f, fcntl.LOCK_SH", id="flock"),
        pytest.param("fcntl.fcntl, f, fcntl.F_GETLK, bytes(32)", id="F_GETLK"),
        pytest.param("fcntl.fcntl, f, 36, bytes(32)", id="F_OFD_GETLK"),
        pytest.param("fcntl.fcntl, f, fcntl.F_SETLEASE, fcntl.F_RDLCK", id="F_SETLEASE"),
        pytest.param("fcntl.fcntl, f, fcntl.F_GETLEASE, 0", id="F_GETLEASE"),
        pytest.param("fcntl.fcntl, d, fcntl.F_NOTIFY, fcntl.DN_ACCESS", id="F_NOTIFY"),
        pytest.param("fcntl.fcntl, f, 1036, (ctypes.c_uint64 * 1)(3)", id="F_SET_RW_HINT"),
        pytest.param("fcntl.fcntl, f, 1038, (ctypes.c_uint64 * 1)(3)", id="F_SET_FILE_RW_HINT"),
        pytest.param("raw, 294, 0", id="inotify_init1"),
        pytest.param("raw, 253", id="inotify_init"),
        pytest.param("raw, 300, 0, 0", id="fanotify_init"),
        pytest.param("os.setxattr, '/tmp', 'user.bit', b'1'", id="setxattr"),
        pytest.param("os.setxattr, d, 'user.bit', b'1'", id="fsetxattr"),
        pytest.param("raw, 463, -100, b'/tmp', 0, b'user.bit', 0, 0", id="setxattrat"),
    ],
)
def test_state_on_shared_files_is_refused(abuse: Abuse, call: str) -> None:
    """Locks, leases, watches, hints and attributes on shared inodes are messages to others."""
    result = abuse(
        f"""
        import fcntl
        f, d = os.open(os.__file__, os.O_RDONLY), os.open('/tmp', os.O_RDONLY)
        print(outcome({call}))
        """,
        raw=True,
    )
    assert result.stdout.strip() in REFUSED | {"ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOLCK"}


def test_locks_on_shared_files_show_nothing(neighbours: NativeSandbox) -> None:
    """A read lock on a file that both can open: the other can neither be stopped by it nor see it.

    Databases lock their own files with the same calls, so these are not refused.
    """
    holder = ExecutionRequest(
        "import fcntl, os, time\n"
        "fcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)\n"
        "time.sleep(0.5)\nprint('held')"
    )
    prober = ExecutionRequest(
        "import fcntl, os, time\n"
        "time.sleep(0.2)\n"
        "f = os.open(os.__file__, os.O_RDONLY)\n"
        "fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)\n"
        "try:\n    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except OSError as error:\n    print(error.errno)"
    )
    held, probed = neighbours.execute_batch([holder, prober])
    assert held.stdout == "held\n"
    assert probed.stdout == f"{errno.EBADF}\n", "EAGAIN would tell that somebody holds the lock"
