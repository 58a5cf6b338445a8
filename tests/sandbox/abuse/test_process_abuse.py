"""Processes that want to outlive their snippet, hide from their killer, or lie about their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


def test_daemon(abuse: Abuse) -> None:
    """Double fork, setsid, SIGTERM ignored, stdout held open (Stevens, APUE 13.3)."""
    result = abuse("""
        import os, signal, time
        ready, go = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(go, b'x')
                time.sleep(600)
            os._exit(0)
        os.read(ready, 1)
        print('the daemon is up')
    """)
    assert (result.status, result.stdout) == (Status.OK, "the daemon is up\n")


def test_stopped_child(abuse: Abuse) -> None:
    """A stopped process runs no handler and answers no SIGTERM."""
    result = abuse("""
        import os, signal
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        _, status = os.waitpid(pid, os.WUNTRACED)
        print(os.WIFSTOPPED(status))
    """)
    assert (result.status, result.stdout) == (Status.OK, "True\n")


def test_main_stops_itself(abuse: Abuse) -> None:
    """SIGSTOP to oneself defeats limits that only count CPU time (code-judge: 28 s for 5 s)."""
    result = abuse(
        "import os; print('going'); os.kill(os.getpid(), 19); print('woken')", timeout_s=0.4
    )
    assert (result.status, result.stdout) == (Status.TIMEOUT, "going\n")


def test_child_stops_main_and_works_on(abuse: Abuse) -> None:
    """The watched process sleeps while its child does the work."""
    result = abuse(
        """
        import os, signal
        main = os.getpid()
        if os.fork() == 0:
            os.kill(main, signal.SIGSTOP)
            print('child works on')
            while True: pass
        os.wait()
        """,
        timeout_s=0.5,
    )
    assert (result.status, result.stdout) == (Status.TIMEOUT, "child works on\n")


def test_zombie_leader_with_a_living_thread(abuse: Abuse) -> None:
    """The main thread alone calls exit: its process looks dead (state Z) and is not."""
    result = abuse(
        """
        import threading
        threading.Thread(target=time.sleep, args=(600,)).start()
        print('leader leaves')
        raw(60, 0)  # exit, not exit_group
        """,
        raw=True,
        timeout_s=0.5,
    )
    assert (result.status, result.stdout) == (Status.TIMEOUT, "leader leaves\n")


def test_exec_from_another_thread(abuse: Abuse) -> None:
    """A thread that execs takes over the leader's pid; the verdict is that of the new program."""
    result = abuse("""
        import os, threading
        argv = ['sh', '-c', 'echo taken over; exit 7']
        threading.Thread(target=os.execv, args=('/bin/sh', argv)).start()
        threading.Event().wait()
    """)
    assert (result.status, result.exit_code, result.stdout) == (Status.ERROR, 7, "taken over\n")


def test_exec_of_another_interpreter(abuse: Abuse) -> None:
    """A fresh interpreter has none of our guest's Python code, but all of the kernel's limits."""
    result = abuse("""
        import os, sys
        code = '''
        import os, resource, socket
        status = open('/proc/self/status').read()
        print('Seccomp:\\t2' in status, 'NoNewPrivs:\\t1' in status, os.getpid(), os.getuid())
        raise SystemExit(9)
        '''.replace('\\n        ', '\\n')
        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', code])
    """)
    assert (result.status, result.exit_code) == (Status.ERROR, 9), result
    assert result.stdout == "True True 2 1000\n"


def test_child_that_wait_does_not_see(abuse: Abuse) -> None:
    """clone with exit signal 0: an ordinary wait skips such a child (needs __WALL)."""
    result = abuse(
        """
        if raw(56, 0, 0, 0, 0, 0) == 0:
            time.sleep(600)
        print(outcome(os.waitpid, -1, os.WNOHANG))
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "ECHILD\n")


def test_sibling_dies_in_our_place(abuse: Abuse) -> None:
    """CLONE_PARENT: the new process is a child of *our* parent, who may take its end for ours."""
    result = abuse(
        """
        CLONE_PARENT = 0x8000
        if raw(56, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            os._exit(0)
        time.sleep(0.2)
        print('still running')
        os._exit(7)
        """,
        raw=True,
    )
    assert (result.status, result.exit_code, result.stdout) == (Status.ERROR, 7, "still running\n")


def test_sibling_that_stays(abuse: Abuse) -> None:
    """As above, but the sibling is the daemon."""
    result = abuse(
        """
        if raw(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            os.setsid()
            time.sleep(600)
        print('main ends')
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "main ends\n")


def test_vfork_whose_child_never_execs(abuse: Abuse) -> None:
    """The parent of a vfork sleeps where only SIGKILL reaches it."""
    result = abuse(
        """
        CLONE_VFORK = 0x4000
        print('before', flush=True)
        if raw(56, CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            signal.pause()
        print('after')
        """,
        raw=True,
        timeout_s=0.4,
    )
    assert (result.status, result.stdout) == (Status.TIMEOUT, "before\n")


def test_zombies_up_to_the_limit(abuse: Abuse) -> None:
    """Zombies count as processes until someone reaps them; here nobody does."""
    result = abuse("""
        import os
        count = 0
        try:
            while True:
                if os.fork() == 0:
                    os._exit(0)
                count += 1
        except BlockingIOError:
            print(count)
    """)
    assert (result.status, result.stdout) == (Status.OK, "15\n")


def test_phoenix(abuse: Abuse) -> None:
    """Every process forks and dies at once: who kills by listing pids never catches the last."""
    result = abuse("""
        import os, time
        if os.fork() == 0:
            while True:
                try:
                    if os.fork():
                        os._exit(0)
                except OSError:
                    pass
        time.sleep(0.2)
        print('main ends')
    """)
    assert (result.status, result.stdout) == (Status.OK, "main ends\n")


def test_every_child_in_a_session_of_its_own(abuse: Abuse) -> None:
    """killpg reaches one process group; these are ten."""
    result = abuse("""
        import os, time
        reader, writer = os.pipe()
        for _ in range(10):
            if os.fork() == 0:
                os.setsid()
                os.write(writer, b'x')
                time.sleep(600)
        up = 0
        while up < 10:
            up += len(os.read(reader, 10))
        print(up)
    """)
    assert (result.status, result.stdout) == (Status.OK, "10\n")


def test_orphans_flood_stdout_after_the_end(abuse: Abuse) -> None:
    """Who reads until end of file never ends (SandboxFusion, code-judge: the orphan's lifetime)."""
    result = abuse("""
        import os
        if os.fork() == 0:
            os.setsid()
            while True:
                os.write(1, b'flood ' * 100)
        print('main ends', flush=True)
    """)
    assert result.status in (Status.OK, Status.OUTPUT)
    assert "main ends\n" in result.stdout
    assert result.wall_s < 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param(36, 1, id="PR_SET_CHILD_SUBREAPER-adopts-orphans"),
        pytest.param(0x59616D61, -1, id="PR_SET_PTRACER-any"),
        pytest.param(47, 2, id="PR_CAP_AMBIENT-raise"),
        pytest.param(28, 0, id="PR_SET_SECUREBITS"),
        pytest.param(35, 1, id="PR_SET_MM-forges-proc"),
        pytest.param(62, 1, id="PR_SCHED_CORE-shares-a-cookie"),
        pytest.param(67, 1, id="PR_SET_MEMORY_MERGE-dedup-channel"),
    ],
)
def test_prctl_that_changes_the_rules(abuse: Abuse, option: int, value: int) -> None:
    """prctl is a hundred calls in one; all that are not needed are refused."""
    result = abuse(f"print(raw(157, {option}, {value}, 0, 0, 0))", raw=True)
    assert result.stdout == "EPERM\n"


def test_no_limit_can_be_raised(abuse: Abuse) -> None:
    """Hard limits are one-way for who lacks CAP_SYS_RESOURCE."""
    result = abuse("""
        import resource
        raised = []
        for limit in range(16):
            soft, hard = resource.getrlimit(limit)
            if hard == resource.RLIM_INFINITY:
                continue
            try:
                resource.setrlimit(limit, (hard + 1, hard + 1))
                raised.append(limit)
            except (OSError, ValueError):
                pass
        print(raised)
        print([resource.getrlimit(getattr(resource, f'RLIMIT_{name}'))[1]
               for name in ('CORE', 'MEMLOCK', 'MSGQUEUE')])
    """)
    assert result.stdout == "[]\n[0, 0, 0]\n"


def test_set_user_id_programs_gain_nothing(abuse: Abuse) -> None:
    """PwnKit (CVE-2021-4034), Looney Tunables (CVE-2023-4911): both start at a setuid program."""
    result = abuse("""
        import os, stat
        found, honoured = 0, []
        for directory in ('/usr/bin', '/usr/sbin', '/usr/lib'):
            for name in os.listdir(directory):
                path = os.path.join(directory, name)
                mode = os.lstat(path).st_mode
                if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                    found += 1
                    if not os.statvfs(path).f_flag & os.ST_NOSUID:
                        honoured.append(path)
        print(honoured, os.getresuid())
        os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.mxfast=glibc.malloc.mxfast=A'
        os.system('id -u; id -ru')
    """)
    assert result.stdout == "[] (1000, 1000, 1000)\n1000\n1000\n"


@pytest.mark.parametrize("call", ["setuid(0)", "setgid(0)", "setresuid(0, 0, 0)", "setgroups([0])"])
def test_becoming_someone_else(abuse: Abuse, call: str) -> None:
    """No other user exists in the namespace (EINVAL), or none may be taken (EPERM)."""
    result = abuse(f"print(outcome(os.{call.replace('(', ', ', 1)})", raw=True)
    assert result.stdout.strip() in {"EPERM", "EINVAL"}
