"""Attacks on pid 1 of the jail: the process every snippet of it is forked from, or watched by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

from .harness import REFUSED

if TYPE_CHECKING:
    from .harness import Abuse


def test_every_signal(abuse: Abuse) -> None:
    """Python's own SIGINT handler, SIGCHLD bookkeeping, SIGSTOP: none may work on pid 1."""
    result = abuse(
        """
        for number in sorted(signal.valid_signals()):
            outcome(os.kill, 1, number)
            raw(200, 1, number)  # tkill
        time.sleep(0.05)
        print('alive')
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "alive\n")


def test_kill_everybody(abuse: Abuse) -> None:
    """kill(-1) reaches all one may signal except oneself and pid 1."""
    result = abuse("""
        import os, signal, time
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.kill(-1, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert (result.status, result.stdout) == (Status.OK, "-9\n")


def test_kill_the_own_group(abuse: Abuse) -> None:
    """If zygote and snippet shared a process group, this would be a kill of both."""
    result = abuse("import os; print('x', flush=True); os.killpg(0, 9)")
    assert (result.status, result.signal, result.stdout) == (Status.ERROR, 9, "x\n")


def test_joining_the_group_of_pid_1(abuse: Abuse) -> None:
    """Group and session membership decide who gets terminal and orphan signals."""
    result = abuse(
        """
        pid = os.fork()
        if pid == 0:
            print(outcome(os.setpgid, 0, 1), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        print(outcome(os.setpgid, 1, 0))
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "EPERM\nESRCH\n")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("302, 1, 0, (ctypes.c_uint64 * 2)(1, 1), 0", id="prlimit64-RLIMIT_CPU"),
        pytest.param("302, 1, 7, (ctypes.c_uint64 * 2)(0, 0), 0", id="prlimit64-RLIMIT_NOFILE"),
        pytest.param("141, 0, 1, 19", id="setpriority-process"),
        pytest.param("141, 1, os.getpgid(1), 19", id="setpriority-group"),
        pytest.param("141, 2, 0, 19", id="setpriority-own-user"),
        pytest.param("141, 2, os.getuid(), 19", id="setpriority-user"),
        pytest.param("203, 1, 8, ctypes.byref(ctypes.c_uint64(1))", id="sched_setaffinity"),
        pytest.param("144, 1, 5, ctypes.byref(ctypes.c_int(0))", id="sched_setscheduler-idle"),
        pytest.param("251, 1, 1, 3 << 13", id="ioprio_set-idle"),
        pytest.param("251, 3, os.getuid(), 3 << 13", id="ioprio_set-user-idle"),
        pytest.param("101, 16, 1, 0, 0", id="PTRACE_ATTACH"),
        pytest.param("101, 0x4206, 1, 0, 0", id="PTRACE_SEIZE"),
        pytest.param("310, 1, 0, 0, 0, 0, 0", id="process_vm_readv"),
        pytest.param("311, 1, 0, 0, 0, 0, 0", id="process_vm_writev"),
        pytest.param("440, pidfd, 0, 0, 0, 0", id="process_madvise"),
        pytest.param("438, pidfd, 0, 0", id="pidfd_getfd"),
        pytest.param("448, pidfd, 0", id="process_mrelease"),
        pytest.param("312, os.getpid(), 1, 0, 0, 0", id="kcmp"),
        pytest.param("279, 1, 0, 0, 0, 0, 0", id="move_pages"),
        pytest.param("256, 1, 1, 0, 0", id="migrate_pages"),
        pytest.param(
            "274, 1, ctypes.byref(ctypes.c_long()), ctypes.byref(ctypes.c_long())",
            id="get_robust_list",
        ),
        pytest.param("308, pidfd, 0x7E020080", id="setns-by-pidfd"),
    ],
)
def test_call_on_pid_1_is_refused(abuse: Abuse, call: str) -> None:
    """What is set for pid 1 (limits, priority, CPUs) every later snippet would inherit."""
    pidfd = "pidfd = raw(434, 1, 0)\nif isinstance(pidfd, str): pidfd = -1\n"
    result = abuse(f"{pidfd}print(raw({call}))", raw=True)
    assert result.stdout.strip() in REFUSED


def test_signals_by_pidfd(abuse: Abuse) -> None:
    """pidfd_send_signal is another door to kill."""
    result = abuse(
        """
        pidfd = raw(434, 1, 0)
        if isinstance(pidfd, int):
            for number in (2, 9, 15, 19):
                raw(424, pidfd, number, 0, 0)
        time.sleep(0.05)
        print('alive')
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "alive\n")


def test_signal_that_claims_to_come_from_the_kernel(abuse: Abuse) -> None:
    """rt_sigqueueinfo with si_code SI_KERNEL: who trusts siginfo is told lies."""
    result = abuse(
        """
        info = (ctypes.c_int * 32)(signal.SIGCHLD, 0, 0x80)
        print(raw(129, 1, signal.SIGCHLD, info))
        """,
        raw=True,
    )
    assert result.stdout == "EPERM\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL", "SIGSTOP"])
def test_signal_from_a_file(abuse: Abuse, number: str) -> None:
    """F_SETOWN and F_SETSIG: the kernel sends the signal, when the socket becomes readable."""
    result = abuse(
        f"""
        import fcntl
        a, b = socket.socketpair()
        for owner in (1, -1):
            outcome(fcntl.fcntl, a, fcntl.F_SETOWN, owner)
            outcome(fcntl.fcntl, a, fcntl.F_SETSIG, signal.{number})
            outcome(fcntl.fcntl, a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            b.send(b'x')
        time.sleep(0.05)
        print('alive')
        """,
        raw=True,
        timeout_s=0.5,
    )
    assert result.stdout in ("alive\n", ""), "pid 1's group may be ours: then it was us"


def test_deadly_exit_signal(abuse: Abuse) -> None:
    """clone with exit signal SIGKILL, then orphaned: the death is announced to pid 1."""
    result = abuse(
        """
        if os.fork() == 0:
            for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT):
                if raw(56, number, 0, 0, 0, 0) == 0:
                    time.sleep(0.05)  # until its parent is gone
                    os._exit(0)
            os._exit(0)
        os.wait()
        time.sleep(0.1)
        print('alive')
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "alive\n")


def test_storm_of_orphans(abuse: Abuse) -> None:
    """Pid 1 must reap hundreds of strangers and still know whose end is the verdict."""
    result = abuse("""
        import os
        for _ in range(100):
            if os.fork() == 0:
                for _ in range(3):
                    try:
                        if os.fork() == 0:
                            os._exit(0)
                    except OSError:
                        pass
                os._exit(0)
            os.wait()
        os._exit(5)
    """)
    assert (result.status, result.exit_code) == (Status.ERROR, 5)


def test_storm_of_signals(abuse: Abuse) -> None:
    """Tens of thousands of signals at pid 1: a handler would run instead of the zygote's work."""
    result = abuse("""
        import os, signal
        try:
            for _ in range(20_000):
                os.kill(1, signal.SIGCHLD)
                os.kill(1, signal.SIGWINCH)
        except PermissionError:
            pass
        print('sent')
    """)
    assert (result.status, result.stdout) == (Status.OK, "sent\n")


def test_files_of_pid_1(abuse: Abuse) -> None:
    """Memory, environment, descriptors, root and namespaces of pid 1 (CVE-2016-9962 and kin)."""
    result = abuse("""
        import os
        opened = []
        private = ['environ', 'mem', 'maps', 'smaps', 'auxv', 'io', 'stack', 'syscall', 'pagemap',
                   'personality', 'root/tmp', 'cwd/.', 'exe', 'fd/0', 'fd/3', 'fdinfo/0',
                   'map_files/.',
                   'ns/user', 'ns/mnt', 'task/1/mem', 'task/1/environ']
        for name in private:
            try:
                os.close(os.open(f'/proc/1/{name}', os.O_RDONLY))
                opened.append(name)
            except OSError:
                pass
        for name in ['comm', 'clear_refs', 'oom_score_adj', 'oom_adj', 'coredump_filter',
                     'autogroup', 'sched', 'timerslack_ns', 'loginuid', 'uid_map', 'gid_map',
                     'setgroups', 'mem', 'timens_offsets', 'task/1/comm']:
            try:
                with open(f'/proc/1/{name}', 'w') as file:
                    file.write('0')
                opened.append(f'{name} for writing')
            except OSError:
                pass
        print(opened)
    """)
    assert result.stdout == "[]\n"


def test_pid_numbers_start_anew(abuse: Abuse) -> None:
    """Pid counters are state: what the last snippet used up must not show."""
    numbers = """
        import os
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.wait()
        print(os.getpid(), pid)
    """
    assert abuse(numbers).stdout == "2 3\n"
    abuse("""
        import os
        for _ in range(50):
            if os.fork() == 0:
                os._exit(0)
            os.wait()
    """)
    assert abuse(numbers).stdout == "2 3\n"
    assert abuse(numbers).stdout == "2 3\n"
