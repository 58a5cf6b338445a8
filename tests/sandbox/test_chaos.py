"""Processes of the sandbox are killed or stopped: each request is answered once, it serves on."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status

from .leaks import (
    Roles,
    assert_ended,
    control_groups,
    host_files,
    is_alive,
    mounts,
    named,
    processes_of,
    roles,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thor_fast.types import ExecutionResult

SLOTS = 2
NAMES = (f"chaos-{n}" for n in itertools.count())


class Victim:
    """A sandbox of two slots, and its processes among those of other tests' sandboxes."""

    def __init__(self) -> None:
        self._others = roles(os.getpid()).templates
        self.sandbox = NativeSandbox(slots=SLOTS)

    def roles(self) -> Roles:
        return roles(os.getpid(), self._others)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (self.roles(), self.sandbox.stats())
            time.sleep(0.005)

    def until_asleep(self, sleeper: Sleeper) -> int:
        """Wait until the snippet sleeps, in its own code; its pid."""
        self.until(lambda: named(os.getpid(), sleeper.name))
        (pid,) = named(os.getpid(), sleeper.name)
        return pid

    def until_idle(self) -> None:
        """Wait until each jail has its parked child."""
        self.until(lambda: len(self.roles().children) == self.sandbox.stats()["jails"])


@pytest.fixture
def victim() -> Iterator[Victim]:
    found = Victim()
    with found.sandbox as sandbox:
        yield found
        results = sandbox.execute_batch([f"print({i})" for i in range(10)])
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(10)], results
        left = processes_of(os.getpid())
        templates = found.roles().templates
    assert templates, "it serves with a living template"
    assert_ended({process for process in left if process.pid in templates})


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def in_background(call: Callable[[], ExecutionResult]) -> Callable[[], ExecutionResult]:
    """Start it; what is returned waits for its result."""
    results: list[ExecutionResult] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def wait() -> ExecutionResult:
        thread.join(timeout=60)
        assert len(results) == 1
        return results[0]

    return wait


class Sleeper:
    """A snippet that says when it has begun to sleep, and sleeps until it gets SIGUSR1."""

    def __init__(self) -> None:
        self.name = next(NAMES)
        self.code = f"""
import ctypes, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
ctypes.CDLL(None).prctl(15, {self.name.encode()})
signal.sigwait([signal.SIGUSR1])
print('woken')
"""
        self.request = ExecutionRequest(self.code, timeout_s=600)


# --- in mid-batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["templates", "zygotes", "children"])
def test_kills_in_mid_batch(victim: Victim, role: str) -> None:
    kills = 3 if role == "templates" else 12
    chosen = random.Random(role)
    stop = threading.Event()
    killed = 0

    def strike() -> None:
        nonlocal killed
        while killed < kills and not stop.wait(0.03):
            pids = getattr(victim.roles(), role)
            # Once a template has been replaced and serves; one that never does is given up.
            if role == "templates" and not victim.roles().children:
                continue
            if pids:
                send([chosen.choice(pids)], signal.SIGKILL)
                killed += 1

    requests = [f"import time; time.sleep(0.01); print({i})" for i in range(300)]
    killer = threading.Thread(target=strike)
    killer.start()
    answers: Counter[int] = Counter()
    results: dict[int, ExecutionResult] = {}
    for index, result in victim.sandbox.as_completed(requests):
        answers[index] += 1
        results[index] = result
    stop.set()
    killer.join()
    assert answers == Counter(range(300)), "each is answered exactly once"
    lost = {i: r for i, r in results.items() if r.status is not Status.OK}
    for i, result in results.items():
        if i not in lost:
            assert result.stdout == f"{i}\n"
        elif result.status is Status.ERROR:  # as if it had killed itself
            assert (role, result.signal) == ("children", signal.SIGKILL)
        else:
            assert (result.status, result.passed) == (Status.INFRA, None)
            assert result.error
    assert killed >= 1
    assert len(lost) <= killed * SLOTS, "only what ran then is lost"


def test_all_at_once_is_survived(victim: Victim) -> None:
    """Served is who asks once they are gone: a jail that is dying may still take a request."""
    for _ in range(3):
        sleeper = Sleeper()
        wait = in_background(partial(victim.sandbox.execute, sleeper.request))
        victim.until_asleep(sleeper)
        found = victim.roles()
        send(found.children + found.zygotes + found.templates, signal.SIGKILL)
        result = wait()
        assert result.status in (Status.INFRA, Status.ERROR)
        victim.until(lambda: victim.sandbox.stats()["jails"] == 0)
        assert victim.sandbox.execute("print(1)").stdout == "1\n"


@pytest.mark.parametrize("role", ["templates", "zygotes", "children"])
def test_an_idle_process_is_replaced_unnoticed(victim: Victim, role: str) -> None:
    victim.sandbox.execute_batch(["print(1)"] * 4)
    victim.until_idle()
    send(getattr(victim.roles(), role), signal.SIGKILL)
    victim.until(lambda: victim.sandbox.stats()["jails"] == 0)
    results = victim.sandbox.execute_batch(["print(2)"] * 4)
    assert [(r.status, r.stdout) for r in results] == [(Status.OK, "2\n")] * 4


def test_a_killed_child_is_the_snippets_own_death(victim: Victim) -> None:
    """From outside or by its own hand: the kernel says the same."""
    sleeper = Sleeper()
    wait = in_background(lambda: victim.sandbox.execute(sleeper.request))
    send([victim.until_asleep(sleeper)], signal.SIGKILL)
    result = wait()
    assert (result.status, result.signal) == (Status.ERROR, signal.SIGKILL)


# --- stopped instead of killed -------------------------------------------------------------------


@pytest.mark.parametrize("role", ["zygotes", "children"])
def test_a_stopped_process_costs_its_snippets_time_limit(victim: Victim, role: str) -> None:
    sleeper = Sleeper()
    request = ExecutionRequest(sleeper.code, timeout_s=5)
    wait = in_background(lambda: victim.sandbox.execute(request))
    child = victim.until_asleep(sleeper)
    send(getattr(victim.roles(), role), signal.SIGSTOP)
    send([child], signal.SIGUSR1)  # what would have ended it
    result = wait()
    assert result.status is Status.TIMEOUT
    assert victim.sandbox.stats()["running"] == 0


def test_a_stopped_parked_child_is_no_failure_of_the_snippet(victim: Victim) -> None:
    send(victim.roles().children, signal.SIGSTOP)
    result = victim.sandbox.execute(ExecutionRequest("print(1)", timeout_s=0.5))
    assert result.status is Status.INFRA
    assert "before it started" in result.error or "died" in result.error


def test_a_stopped_template_stops_neither_jails_nor_close() -> None:
    others = roles(os.getpid()).templates
    with NativeSandbox(slots=1) as sandbox:
        templates = roles(os.getpid(), others).templates
        send(templates, signal.SIGSTOP)
        assert sandbox.execute("print(1)").stdout == "1\n"
        mine = {p for p in processes_of(os.getpid()) if p.pid in templates or p.parent in templates}
        assert len(mine) >= 2
    assert_ended(mine)


# --- streams and sessions ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["templates", "zygotes", "children"])
@pytest.mark.parametrize("rewindable", [False, True])
def test_a_session_ends_and_the_next_one_works(victim: Victim, role: str, rewindable: bool) -> None:
    with victim.sandbox.session(rewindable=rewindable) as session:
        assert session.execute("x = 1").status is Status.OK
        sleeper = Sleeper()
        wait = in_background(lambda: session.execute(sleeper.code, timeout_s=600))
        victim.until_asleep(sleeper)
        send(getattr(victim.roles(), role), signal.SIGKILL)
        assert wait().status in (Status.INFRA, Status.ERROR)
        after = session.execute("print(x)")
        assert after.status is Status.INFRA
        assert "the dialogue is over" in after.error
    with victim.sandbox.session(rewindable=rewindable) as session:
        assert session.execute("x = 2").status is Status.OK
        assert session.execute("print(x)").stdout == "2\n"


@pytest.mark.parametrize("role", ["templates", "zygotes"])
def test_an_idle_session_is_told_with_its_next_block(victim: Victim, role: str) -> None:
    with victim.sandbox.session() as session:
        session.execute("x = 1")
        before = getattr(victim.roles(), role)
        send(before, signal.SIGKILL)
        victim.until(lambda: not set(getattr(victim.roles(), role)) & set(before))
        over = session.execute("print(x)")
        assert over.status is Status.INFRA
        assert over.error
    victim.until(lambda: victim.sandbox.stats()["dialogues"] == 0)


@pytest.mark.parametrize("role", ["templates", "zygotes"])
def test_a_stream_is_answered_once(victim: Victim, role: str) -> None:
    sleeper = Sleeper()
    with victim.sandbox.open(ExecutionRequest("", timeout_s=600)) as block:
        block.feed(f"print(1)\n{sleeper.code}print(1)\n")
        victim.until_asleep(sleeper)
        send(getattr(victim.roles(), role), signal.SIGKILL)
        block.feed("print(2)\n")
        result = block.finish()
    assert (result.status, result.passed) == (Status.INFRA, None)


# --- the owner -----------------------------------------------------------------------------------

DAEMON = """
import ctypes, os, time
for place in ("", "/tmp/", "/dev/shm/"):
    open(place + os.environ["MARK"], "w").write("x")
if os.fork() == 0:
    os.setsid()
    ctypes.CDLL(None).prctl(15, b"daemon")
time.sleep(600)
"""

OWNER = """
import asyncio, os, signal, sys, threading, time
sys.path.append(sys.argv[1])
import leaks
from thor_fast.sandbox import ExecutionRequest, NativeSandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where our starter ignores it
mark = f"chaos-{os.getpid()}"
sandbox = NativeSandbox(slots=3)
request = ExecutionRequest(DAEMON, timeout_s=900, files={mark: b"in"}, env={"MARK": mark})
run = lambda: sandbox.execute_batch([request] * 50)
session = sandbox.session(rewindable=True)
session.execute("x = 1")
stream = sandbox.open()
stream.feed("print(1)\\n")
threading.Thread(target=run, daemon=True).start()
while len(leaks.named(os.getpid(), "daemon")) < 3:
    time.sleep(0.01)
FORK
print("ready", flush=True)
ENDING
"""
WAIT = "time.sleep(600)"
FORK = """
if os.fork() == 0:
    signal.alarm(250)
    os.closerange(0, 3)
    time.sleep(600)
"""


def start_owner(ending: str, fork: str = "") -> subprocess.Popen[bytes]:
    script = OWNER.replace("DAEMON", repr(DAEMON)).replace("FORK", fork).replace("ENDING", ending)
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", script, Path(__file__).parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    return owner


@pytest.mark.parametrize(
    ("ending", "fork", "kill"),
    [
        ("", "", None),
        ("raise RuntimeError('x')", "", None),
        ("os._exit(3)", "", None),
        ("os.abort()", "", None),
        ("os.execv('/bin/sleep', ['sleep', '1'])", "", None),
        ("threading.Thread(target=os._exit, args=(0,)).start()", "", None),
        ("asyncio.run(sandbox.submit(request))", "", signal.SIGINT),
        (WAIT, "", signal.SIGTERM),
        (WAIT, "", signal.SIGKILL),
        (WAIT, FORK, signal.SIGTERM),
        (WAIT, FORK, signal.SIGKILL),
    ],
)
def test_nothing_at_all_outlives_the_owner(
    ending: str, fork: str, kill: signal.Signals | None
) -> None:
    before = mounts()
    with start_owner(ending, fork) as owner:
        below = processes_of(owner.pid)
        templates = roles(owner.pid).templates
        forks = {p for p in below if p.parent == owner.pid and p.pid not in templates}
        forks = forks if fork else set()  # without one it may have ended meanwhile
        try:
            assert len(forks) == bool(fork)
            if kill is not None:
                assert len(below) >= 10
                owner.send_signal(kill)
            owner.wait(timeout=60)
            assert_ended(below - forks)
            assert all(map(is_alive, forks)), "it is the sandbox that ends, not the fork"
            deadline = time.monotonic() + 60
            while control_groups(owner.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert control_groups(owner.pid) == []
            assert host_files(f"chaos-{owner.pid}") == []
            assert mounts() == before
        finally:
            send([p.pid for p in forks], signal.SIGKILL)


def test_groups_of_an_owner_that_could_not_clean_up_are_removed_by_the_next() -> None:
    """It and its templates die at one moment: nobody is left to remove directories."""
    with start_owner(WAIT) as owner:
        below = processes_of(owner.pid)
        both = [owner.pid, *roles(owner.pid).templates]
        send(both, signal.SIGSTOP)
        send(both, signal.SIGKILL)
        owner.wait(timeout=60)
        assert_ended(below)
    with NativeSandbox(slots=1) as sandbox:
        assert control_groups(owner.pid) == []
        assert sandbox.execute("print(1)").stdout == "1\n"
