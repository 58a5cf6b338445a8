"""Fork bombs in several shapes. Each hits the process limit; none outlives its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            """
            import os
            while True:
                try: os.fork()
                except OSError: pass
            """,
            id="fork-that-swallows-errors",
        ),
        pytest.param(
            """
            import os, signal
            for number in range(1, 32):
                if number not in (9, 19):
                    signal.signal(number, signal.SIG_IGN)
            while True:
                try:
                    if os.fork() == 0: os.setsid()
                except OSError: pass
            """,
            id="deaf-and-in-new-sessions",
        ),
        pytest.param(
            """
            import os, threading
            def grow():
                while True:
                    try: threading.Thread(target=grow).start()
                    except RuntimeError: pass
                    try: os.fork()
                    except OSError: pass
            grow()
            """,
            id="threads-that-fork",
        ),
        pytest.param(
            """
            import os
            open('bomb', 'w').write('exec /bin/sh bomb')
            os.execv('/bin/sh', ['sh', 'bomb'])
            """,
            id="exec-for-ever-under-one-pid",
        ),
        pytest.param(
            """
            import os, subprocess
            subprocess.run(['sh', '-c', 'b() { b | b & }; while :; do b; done'])
            while True: pass
            """,
            id="shell",
        ),
    ],
)
def test_endless_bomb_is_a_timeout(abuse: Abuse, code: str) -> None:
    """The classic, and variations that survive a failing fork, SIGTERM or killpg."""
    result = abuse(code, timeout_s=0.6)
    # On a slow machine its threads' stacks and page tables can reach the memory limit first.
    assert result.status in (Status.TIMEOUT, Status.MEMORY)


def test_threads_count_as_processes(abuse: Abuse) -> None:
    """A limit on processes alone is evaded by threads (RLIMIT_NPROC and pids.max count both)."""
    result = abuse(
        """
        import threading
        stop, count = threading.Event(), 0
        try:
            while True:
                threading.Thread(target=stop.wait).start()
                count += 1
        except RuntimeError as error:
            print(count, error)
        stop.set()
        """,
        max_processes=8,
    )
    assert (result.status, result.stdout) == (Status.OK, "7 can't start new thread\n")


def test_spawned_programs_count(abuse: Abuse) -> None:
    """posix_spawn and vfork go the same way as fork."""
    result = abuse(
        """
        import os
        count = 0
        try:
            while True:
                os.posix_spawn('/bin/sleep', ['sleep', '600'], {})
                count += 1
        except BlockingIOError:
            print(count)
        """,
        max_processes=8,
    )
    assert (result.status, result.stdout) == (Status.OK, "7\n")


def test_processes_of_processes_count(abuse: Abuse) -> None:
    """The limit is the tree's: grandchildren find it used up."""
    result = abuse(
        """
        import os, time
        reader, writer = os.pipe()
        wait, go = os.pipe()
        for _ in range(3):
            if os.fork() == 0:
                os.read(wait, 1)
                for _ in range(3):
                    try:
                        if os.fork() == 0:
                            os.write(writer, b'+')
                            time.sleep(600)
                    except BlockingIOError:
                        os.write(writer, b'-')
                time.sleep(600)
        os.write(go, b'xyz')
        seen = b''
        while len(seen) < 9:
            seen += os.read(reader, 9)
        print(seen.count(b'+'), seen.count(b'-'))
        """,
        max_processes=8,
    )
    assert (result.status, result.stdout) == (Status.OK, "4 5\n")


def test_worker_pool_larger_than_the_limit(abuse: Abuse) -> None:
    """multiprocessing with the default of many workers fails as an error, not as a hang."""
    result = abuse(
        """
        import multiprocessing
        multiprocessing.get_context('fork').Pool(64)
        """,
        timeout_s=2,
    )
    assert result.status in (Status.ERROR, Status.TIMEOUT)
    assert "BlockingIOError" in result.stderr
