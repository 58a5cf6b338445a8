"""Signals and timers: deafness to them, floods of them, and those that would ring too late."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


def test_all_signals_blocked(abuse: Abuse) -> None:
    """Limits kept by SIGALRM or SIGTERM inside the process end here (code-judge, ToRL)."""
    result = abuse(
        """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True: pass
        """,
        timeout_s=0.4,
    )
    assert result.status is Status.TIMEOUT


def test_cpu_limit_ignored(abuse: Abuse) -> None:
    """SIGXCPU ignored: the hard limit's SIGKILL follows, and still reads as TIMEOUT."""
    result = abuse(
        """
        import signal
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        while True: pass
        """,
        timeout_s=20,
        cpu_s=1,
    )
    assert result.status is Status.TIMEOUT
    assert result.cpu_s < 4


def test_cpu_time_shared_among_children(abuse: Abuse) -> None:
    """Each child has a CPU clock of its own; the wall clock ends the relay."""
    result = abuse(
        """
        import os, time
        while True:
            if os.fork() == 0:
                end = time.process_time() + 0.05
                while time.process_time() < end: pass
                os._exit(0)
            os.wait()
        """,
        timeout_s=0.6,
        cpu_s=0.3,
    )
    assert result.status is Status.TIMEOUT


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param("signal.setitimer(signal.ITIMER_REAL, 0.15)", id="setitimer"),
        pytest.param("signal.setitimer(signal.ITIMER_PROF, 0.001)", id="setitimer-cpu"),
        pytest.param(
            "raw(222, 1, 0, ctypes.byref(ctypes.c_int()));"
            "raw(223, 0, 0, (ctypes.c_long * 4)(0, 0, 0, 150_000_000), 0)",
            id="timer_create",
        ),
    ],
)
def test_timer_does_not_ring_in_the_next_snippet(abuse: Abuse, arm: str) -> None:
    """A leftover alarm kills whoever comes next (snippets share a parent, not a timer)."""
    armed = abuse(f"{arm}\nprint('armed')\nsys.stdout.flush()\nos._exit(0)", raw=True)
    assert (armed.status, armed.stdout) == (Status.OK, "armed\n")
    later = abuse("import time; time.sleep(0.3); sum(range(10**5)); print('slept')")
    assert (later.status, later.stdout) == (Status.OK, "slept\n")


def test_queue_of_pending_signals_is_bounded(abuse: Abuse) -> None:
    """Blocked real-time signals queue up in kernel memory until RLIMIT_SIGPENDING."""
    result = abuse(
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
        info = (ctypes.c_int * 32)(signal.SIGRTMIN, 0, -1)
        for count in range(200_000):
            if raw(129, os.getpid(), signal.SIGRTMIN, info) == 'EAGAIN':
                break
        print(count < 199_999)
        """,
        raw=True,
        timeout_s=8,
    )
    assert (result.status, result.stdout) == (Status.OK, "True\n")


def test_two_processes_stop_and_wake_each_other(abuse: Abuse) -> None:
    """Ever changing process states: a supervisor that waits for a quiet one waits for ever."""
    result = abuse(
        """
        import os, signal
        main, pid = os.getpid(), os.fork()
        other = pid or main
        while True:
            os.kill(other, signal.SIGSTOP)
            os.kill(other, signal.SIGCONT)
        """,
        timeout_s=0.4,
    )
    assert result.status is Status.TIMEOUT


def test_handler_that_returns_to_the_crash(abuse: Abuse) -> None:
    """A SIGSEGV handler in C that returns: the crash repeats for ever."""
    result = abuse(
        """
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGSEGV, handler)
        ctypes.memmove(0, b'x', 1)
        """,
        raw=True,
        timeout_s=0.4,
    )
    assert (result.status, result.signal) in (
        (Status.TIMEOUT, signal.SIGKILL),
        (Status.ERROR, signal.SIGSEGV),  # the handler's own fault while the first is handled
    )


def test_timer_that_fires_all_the_time(abuse: Abuse) -> None:
    """A one-microsecond interval timer burns time in the kernel's interrupt path."""
    result = abuse(
        """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)
        while True: pass
        """,
        timeout_s=0.4,
    )
    assert result.status is Status.TIMEOUT


def test_policy_kill_forged(abuse: Abuse) -> None:
    """SIGSYS sent to oneself may look like a policy kill, never like a pass."""
    result = abuse("import os; os.kill(os.getpid(), 31)")
    assert (result.passed, result.signal) == (False, signal.SIGSYS)


def test_clock_cannot_be_set(abuse: Abuse) -> None:
    """settimeofday, clock_settime, adjtimex, clock_adjtime; alarms that wake a sleeping host."""
    result = abuse(
        """
        print(raw(164, (ctypes.c_long * 2)(0, 0), 0), raw(227, 0, (ctypes.c_long * 2)(0, 0)),
              raw(159, ctypes.create_string_buffer(256)),
              raw(305, 0, ctypes.create_string_buffer(256)))
        CLOCK_REALTIME_ALARM = 8
        print(raw(283, CLOCK_REALTIME_ALARM, 0))  # timerfd_create
        """,
        raw=True,
    )
    assert result.stdout == "EPERM EPERM EPERM EPERM\nEPERM\n"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("outcome(os.nice, -5)", id="nice"),
        pytest.param("raw(144, 0, 1, ctypes.byref(ctypes.c_int(1)))", id="SCHED_FIFO"),
        pytest.param("raw(144, 0, 3, ctypes.byref(ctypes.c_int(0)))", id="SCHED_BATCH"),
        pytest.param(
            "raw(314, 0, (ctypes.c_uint64 * 6)(48 | 6 << 32, 0, 0, 10**7, 10**7, 10**7), 0)",
            id="SCHED_DEADLINE",
        ),
    ],
)
def test_priority_cannot_be_raised(abuse: Abuse, call: str) -> None:
    """A snippet with a better priority than the supervisor starves it."""
    assert abuse(f"print({call})", raw=True).stdout in ("EPERM\n", "EACCES\n")
