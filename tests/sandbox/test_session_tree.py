"""Sessions that are forked and rewound: each goes on from the state it is in, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import itertools
import os
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thor_fast.errors import SandboxError
from thor_fast.sandbox import Determinism, ExecutionRequest, NativeSandbox, Status

from .leaks import Process, assert_ended, processes_of, roles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thor_fast.sandbox import Session

MANY = ExecutionRequest("", max_processes=100)
ROUTER_AND_FIRST_STATE = 2


@pytest.fixture
def session(sandbox: NativeSandbox) -> Iterator[Session]:
    with sandbox.session(MANY, rewindable=True) as first:
        yield first


def shown(session: Session, expression: str) -> str:
    """What the session says of it; looking leaves no block behind."""
    result = session.execute(f"print({expression})")
    assert result.status is Status.OK, result
    session.rewind()
    return result.stdout.rstrip("\n")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- equal at the fork, independent after it -----------------------------------------------------


def test_a_fork_starts_in_the_same_state(session: Session) -> None:
    session.execute("import random, math\nclass A: n = [1]\na = A()\nrandom.seed(5)\nf = lambda: a")
    with session.fork() as fork:
        draw = "print(random.random(), random.gauss(0, 1), math.tau, f() is a, A.n)"
        assert fork.execute(draw).stdout == session.execute(draw).stdout
        assert fork.execute(draw).stdout == session.execute(draw).stdout


def test_forks_go_their_own_ways(session: Session) -> None:
    session.execute("values = [1]\nimport sys")
    with session.fork() as fork:
        fork.execute("values.append(2)\nimport json\nx = 'fork'\nsys.setrecursionlimit(500)")
        session.execute("values.append(3)\ny = 'session'")
        assert shown(fork, "values, x, sys.getrecursionlimit()") == "[1, 2] fork 500"
        assert shown(session, "values, y, sys.getrecursionlimit() > 500") == "[1, 3] session True"
        assert "NameError" in session.execute("x").stderr
        assert "NameError" in session.execute("json").stderr
        assert "NameError" in fork.execute("y").stderr


def test_before_the_first_block(session: Session) -> None:
    with session.fork() as fork:
        assert fork.execute("x = 1").status is Status.OK
        assert "NameError" in session.execute("x").stderr
        assert shown(fork, "x") == "1"


def test_forks_of_forks(session: Session) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [session]
        session.execute("path = ''")
        for depth in range(4):
            forks = [stack.enter_context(s.fork()) for s in sessions]
            for n, s in enumerate(sessions + forks):
                s.execute(f"path += '{depth}.{n} '")
            sessions += forks
        assert [len(shown(s, "path").split()) for s in sessions] == [4] * 16
        assert len({shown(s, "path") for s in sessions}) == 16


def test_rewinding_one_leaves_the_others(session: Session) -> None:
    for i in range(4):
        session.execute(f"x = {i}")
    with session.fork() as fork:
        session.rewind(2)
        assert (shown(session, "x"), shown(fork, "x")) == ("1", "3")
        fork.rewind(3)
        session.rewind()
        assert (shown(session, "x"), shown(fork, "x")) == ("0", "0")
        fork.execute("x = 'fork'")
        assert (shown(session, "x"), shown(fork, "x")) == ("0", "fork")
        with pytest.raises(ValueError, match="blocks is 2, expected at most 1, as many as"):
            session.rewind(2)


def test_blocks_are_counted_along_the_branch(session: Session) -> None:
    session.execute("x = 1")
    with session.fork() as fork:
        for s in (session, fork):
            assert 'File "block2.py", line 1' in s.execute("1 / 0").stderr


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("x = 'changed'\n1 / 0", "changed"),
        ("x = 'changed'\nraise SystemExit(2)", "start"),
        ("x = 'changed'\nimport os; os._exit(3)", "start"),
        ("x = 'changed'\nwhile True: pass", "start"),
        ("x = 'changed'\nimport ctypes; ctypes.string_at(0)", "start"),
    ],
)
def test_forking_after_a_failed_block(session: Session, code: str, kept: str) -> None:
    session.execute("x = 'start'")
    failed = session.execute(code, timeout_s=1)
    assert failed.passed is False
    with session.fork() as fork:
        assert shown(fork, "x") == shown(session, "x") == kept
        session.execute("x = 0")
        assert shown(fork, "x") == kept


def test_a_group_sampled_anew_from_before_a_failed_call(session: Session) -> None:
    session.execute("import random\nrandom.seed(1)\nnotes = ['shared']")
    assert session.execute("notes.append('failed')\n1 / 0").passed is False
    session.rewind()
    forks = [session.fork() for _ in range(16)]
    for n, fork in enumerate(forks):
        result = fork.execute(f"notes.append({n})\nprint(random.random(), notes)")
        assert result.stdout == f"{random.Random(1).random()} ['shared', {n}]\n"
    for n, fork in enumerate(forks):
        assert fork.execute("print(notes)").stdout == f"['shared', {n}]\n"
        fork.close()
    assert shown(session, "notes") == "['shared']"


def test_a_deterministic_fork_draws_the_same_entropy() -> None:
    draw = "import os, time\nprint(os.urandom(8), time.time(), random.random())"
    with (
        NativeSandbox(slots=1, deterministic=Determinism()) as sandbox,
        sandbox.session(rewindable=True) as session,
        sandbox.session() as plain,
    ):
        for s in (session, plain):
            s.execute("import random")
        with session.fork() as fork:
            for _ in range(2):
                expected = plain.execute(draw).stdout
                assert session.execute(draw).stdout == expected
                assert fork.execute(draw).stdout == expected


# --- used at once --------------------------------------------------------------------------------


def test_forks_are_used_at_once_from_one_loop(sandbox: NativeSandbox) -> None:
    async def one(session: Session, n: int) -> str:
        with session.fork() as fork:
            for _ in range(3):
                await fork.submit(f"values.append({n})")
            await fork.arewind()
            return (await fork.submit("print(values)")).stdout

    async def main() -> list[str]:
        with sandbox.session(MANY, rewindable=True) as session:
            await session.submit("values = []")
            return await asyncio.gather(*(one(session, n) for n in range(8)))

    assert asyncio.run(main()) == [f"[{n}, {n}]\n" for n in range(8)]


def test_forks_are_used_at_once_from_threads(session: Session) -> None:
    session.execute("values = []")
    seen: dict[int, str] = {}

    def one(n: int) -> None:
        with session_forks[n] as fork:
            for _ in range(5):
                fork.execute(f"values.append({n})")
            seen[n] = fork.execute("print(values)").stdout

    session_forks = [session.fork() for _ in range(4)]
    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {n: f"{[n] * 5}\n" for n in range(4)}


def test_a_block_that_waits_for_its_turn_can_be_cancelled(sandbox: NativeSandbox) -> None:
    async def main() -> tuple[str, str]:
        with sandbox.session(MANY, rewindable=True) as session, session.fork() as fork:
            await session.submit("x = 1")
            slow = asyncio.create_task(session.submit("import time; time.sleep(0.5)\nx = 2"))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(fork.submit("x = 3"))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            await slow
            missing = (await fork.submit("x")).stderr
            return (await session.submit("print(x)")).stdout, missing.splitlines()[-1]

    assert asyncio.run(main()) == ("2\n", "NameError: name 'x' is not defined")


def test_cancelling_a_block_that_runs_ends_all_of_the_jail(sandbox: NativeSandbox) -> None:
    async def main() -> tuple[Status, str]:
        with sandbox.session(MANY, rewindable=True) as session, session.fork() as fork:
            await session.submit("x = 1")
            running = asyncio.create_task(session.submit("while True: pass"))
            await asyncio.sleep(0.2)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            result = await fork.submit("print(1)")
            return result.status, result.error

    status, error = asyncio.run(main())
    assert (status, "the dialogue is over" in error) == (Status.INFRA, True)


# --- limits --------------------------------------------------------------------------------------


def test_a_time_limit_in_one_leaves_the_others(session: Session) -> None:
    session.execute("x = 1")
    with session.fork() as fork:
        endless = (
            "import subprocess; x = 2; print('on', flush=True)\nsubprocess.run(['sleep', '99'])"
        )
        died = session.execute(endless, timeout_s=0.5)
        assert (died.status, died.stdout) == (Status.TIMEOUT, "on\n")
        assert (shown(session, "x"), shown(fork, "x")) == ("1", "1")


def test_more_states_than_processes(sandbox: NativeSandbox) -> None:
    request = ExecutionRequest("", max_processes=6)
    room = 6 - ROUTER_AND_FIRST_STATE
    with sandbox.session(request, rewindable=True) as session:
        forks = [session.fork() for _ in range(room + 2)]
        results = [fork.execute(f"x = {n}") for n, fork in enumerate(forks)]
        assert [r.status for r in results] == [Status.OK] * room + [Status.INFRA] * 2
        assert "each kept state counts towards max_processes" in results[-1].error
        forks[0].rewind()
        assert forks[-1].execute("x = 'now'").status is Status.OK
        forks[1].execute("print(x)")  # no room
        forks[2].close()
        assert forks[1].execute("print(x)").stdout == "1\n"
        for fork in forks:
            fork.close()
        for n in range(3 * room):  # an endless rewinding does not pile up
            assert session.execute(f"print({n})").stdout == f"{n}\n"
            session.rewind()
    with pytest.raises(ValueError, match="max_processes is 2, expected at least 3"):
        sandbox.session(ExecutionRequest("", max_processes=2), rewindable=True)


def test_threads_that_fill_the_limit_cost_the_block(sandbox: NativeSandbox) -> None:
    request = ExecutionRequest("", max_processes=5)
    start = "threading.Thread(target=time.sleep, args=(99,)).start()\n"
    with sandbox.session(request, rewindable=True) as session:
        one = session.execute("import threading, time\n" + start)
        assert one.status is Status.OK, one
        session.rewind()
        two = session.execute("import threading, time\n" + start * 2)
        assert two.status is Status.ERROR
        assert "the state after this block cannot be kept: fork: " in two.stderr
        assert shown(session, "1 + 1") == "2"


# --- what a block leaves running -----------------------------------------------------------------

LASTING = """
import os, subprocess, sys, threading, time
def shout():
    while True:
        print('leaked', flush=True)
        time.sleep(0.001)
threading.Thread(target=shout, daemon=True).start()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        shout()
    os._exit(0)
subprocess.Popen(['sh', '-c', 'while true; do echo leaked; done'], start_new_session=True)
x = 'kept'
"""


def test_what_a_block_leaves_running_ends_with_it(session: Session) -> None:
    with session.fork() as fork:
        assert session.execute(LASTING).status is Status.OK
        for s in (session, fork) * 3:
            quiet = s.execute("import time; time.sleep(0.02); print('quiet')")
            assert quiet.stdout == "quiet\n"
        assert shown(session, "x, threading.active_count()") == "kept 1"


def test_timers_and_handlers_of_a_kept_state_stay_silent(session: Session) -> None:
    session.execute(
        "import signal, time\nn = 0\n"
        "def tick(*_):\n    global n; n += 1; print('tick', flush=True)\n"
        "signal.signal(signal.SIGALRM, tick); signal.setitimer(signal.ITIMER_REAL, 0.3, 0.01)\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    )
    session.execute("time.sleep(0.5)")
    assert shown(session, "n") == "0"
    assert session.execute("signal.raise_signal(signal.SIGALRM)").stdout == "tick\n"
    assert session.execute("import os; os._exit(5)").exit_code == 5


def test_a_fork_that_comes_back_ends_with_its_own_block(session: Session) -> None:
    twice = session.execute("import os\npid = os.fork()\nif pid: os.wait()\nprint(pid > 0)")
    assert (twice.status, twice.stdout) == (Status.OK, "False\nTrue\n")
    assert shown(session, "pid > 0") == "True"


# --- hostile blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.closerange(3, 256)",
        "import os; os.closerange(3, 256); open('/dev/null'); open('/dev/null')",
        "import os; [os.write(fd, b'x') for fd in range(3, 256) if not os.isatty(0)]",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getppid(), signal.SIGSTOP); os._exit(0)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL); os._exit(0)",
        "import os, signal; os.killpg(0, signal.SIGKILL)",
        "import os, signal; os.fork() or os.kill(os.getppid(), signal.SIGKILL)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import socket, os\nfor _ in 'ab': socket.socket(fileno=os.dup(3)).send(b'[\"block\", 0]')",
        "import sys; sys.stdout = sys.stderr = object()",
        "import os, json, marshal\nos.fork = os._exit = os.kill = os.getpid = json.dumps = None",
    ],
)
def test_what_a_block_breaks_is_its_own(session: Session, code: str) -> None:
    session.execute("x = 'before'")
    with session.fork() as fork, session.fork() as same:
        fork.execute("x = 'fork'")
        session.execute("y = 1")
        hurt = session.execute(code, timeout_s=1)
        assert hurt.status is not Status.INFRA
        assert fork.execute("print(x)").stdout == "fork\n"
        assert same.execute("print(x)").stdout == "before\n"
        after = session.execute("print(x, file=__import__('sys').__stdout__)")
        if after.status is Status.INFRA:
            assert "the process that kept the state before it was killed" in after.error
        else:
            assert after.stdout in ("before\n", "")


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_the_routers_end_is_the_end_of_all(sandbox: NativeSandbox, number: str) -> None:
    with sandbox.session(rewindable=True) as session, session.fork() as fork:
        session.execute("import os, signal")
        killed = session.execute(f"os.kill(2, signal.{number})\nos._exit(0)", timeout_s=0.3)
        assert killed.passed is False
        after = fork.execute("print(1)")
        assert (after.status, "the dialogue is over" in after.error) == (Status.INFRA, True)


def test_a_state_that_another_branch_has_killed(session: Session) -> None:
    session.execute("import os")
    with session.fork() as fork:
        pid = fork.execute("print(os.getpid())").stdout
        session.execute(f"os.kill({pid}, 9)")
        gone = fork.execute("print(1)")
        assert gone.status is Status.INFRA
        assert "the process that kept the state before it was killed" in gone.error
        fork.rewind()
        assert fork.execute("print(1)").stdout == "1\n"


# --- the end -------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[tuple[NativeSandbox, Callable[[], set[Process]]]]:
    """A sandbox with a count of its living processes, apart from those of the shared one."""
    others = roles(os.getpid()).templates

    def below() -> set[Process]:
        (template,) = roles(os.getpid(), others).templates
        return {process for process in processes_of(template) if process.state != "Z"}

    with NativeSandbox(slots=1) as sandbox:
        yield sandbox, below


def test_closing_frees_what_only_that_session_can_reach(
    own: tuple[NativeSandbox, Callable[[], set[Process]]],
) -> None:
    sandbox, below = own
    with sandbox.session(MANY, rewindable=True) as session:
        session.execute("x = 1")
        alone = len(below())
        fork = session.fork()
        for _ in range(3):
            fork.execute("x += 1")
        deeper = fork.fork()
        deeper.execute("x += 1")
        assert len(below()) >= alone + 4
        fork.close()  # what it can reach, its fork can too
        assert shown(deeper, "x") == "5"
        deeper.close()
        until(lambda: len(below()) <= alone)
        assert shown(session, "x") == "1"
        left = below()
    assert_ended(left)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_closing_in_any_order_leaves_no_process(
    own: tuple[NativeSandbox, Callable[[], set[Process]]], order: tuple[int, ...]
) -> None:
    sandbox, below = own
    session = sandbox.session(rewindable=True)
    session.execute("x = 1")
    branches = [session, session.fork()]
    branches.append(branches[1].fork())
    for n, branch in enumerate(branches):
        branch.execute(f"x = {n}")
    made = below()
    assert len(made) >= ROUTER_AND_FIRST_STATE + 4
    for n in order:
        assert shown(branches[n], "x") == str(n)
        branches[n].close()
        branches[n].close()
        with pytest.raises(SandboxError, match="this session is closed"):
            branches[n].execute("x")
        with pytest.raises(SandboxError, match="this session is closed"):
            branches[n].fork()
    assert sandbox.stats()["dialogues"] == 0
    assert_ended(made)


def test_forks_that_are_dropped(sandbox: NativeSandbox) -> None:
    request = ExecutionRequest("", max_processes=5)
    session = sandbox.session(request, rewindable=True)
    session.execute("x = 1")
    for n in range(10):  # without their end there would be no process left
        assert session.fork().execute(f"print({n})").stdout == f"{n}\n"
        gc.collect()
    assert shown(session, "x") == "1"
    last = session.fork()
    del session
    gc.collect()
    assert last.execute("print(x)").stdout == "1\n"
    del last
    gc.collect()
    until(lambda: sandbox.stats()["dialogues"] == 0)


def test_only_sessions_that_keep_states_can_be_forked(sandbox: NativeSandbox) -> None:
    with sandbox.session() as session, pytest.raises(SandboxError, match="keeps no states"):
        session.fork()


# --- against a model -----------------------------------------------------------------------------


@dataclass
class Model:
    """A branch as plain Python has it: the namespaces after its blocks."""

    kept: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def execute(self, code: str) -> tuple[str, int]:
        """What it prints, and its exit code."""
        namespace, out = copy.deepcopy(self.kept[-1]), io.StringIO()
        exit_code = 0
        with contextlib.redirect_stdout(out):
            try:
                exec(code, {"__builtins__": __builtins__}, namespace)
            except SystemExit as stop:
                return out.getvalue(), int(str(stop.code))
            except Exception:  # noqa: BLE001  (the block's)
                exit_code = 1
        self.kept.append(namespace)
        return out.getvalue(), exit_code


NAMES = st.sampled_from("abc")
NUMBERS = st.integers(0, 9)
BLOCKS = st.one_of(
    st.builds("{} = {}".format, NAMES, NUMBERS),
    st.builds("{0} = [{1}]\n{2} = {0}".format, NAMES, NUMBERS, NAMES),
    st.builds("{}.append({})\nprint({})".format, NAMES, NUMBERS, NAMES),
    st.builds("{} += {}".format, NAMES, NAMES),
    st.builds("print({}, {})".format, NAMES, NAMES),
    st.builds("{} = {}\nraise ValueError".format, NAMES, NUMBERS),
    st.builds("{} = {}\nprint({})\nraise SystemExit({})".format, NAMES, NUMBERS, NUMBERS, NUMBERS),
    st.builds("del {}".format, NAMES),
    st.just("def f(:"),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["execute"] * 4 + ["fork", "rewind", "close"]),
        st.integers(0, 7),
        BLOCKS,
    ),
    min_size=5,
    max_size=25,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_any_tree_of_sessions_is_that_of_plain_python(
    sandbox: NativeSandbox, steps: list[tuple[str, int, str]]
) -> None:
    branches = [(sandbox.session(MANY, rewindable=True), Model())]
    try:
        for kind, number, code in steps:
            session, model = branches[number % len(branches)]
            if kind == "execute":
                result = session.execute(code)
                assert (result.stdout, result.exit_code) == model.execute(code), code
            elif kind == "fork":
                branches.append((session.fork(), Model(list(model.kept))))
            elif kind == "rewind" and len(model.kept) > 1:
                blocks = 1 + number % (len(model.kept) - 1)
                session.rewind(blocks)
                del model.kept[-blocks:]
            elif kind == "close" and len(branches) > 1:
                session.close()
                branches.remove((session, model))
        for session, model in branches:
            everything = "print([(n, globals().get(n)) for n in 'abc'])"
            names = [(n, model.kept[-1].get(n)) for n in "abc"]
            assert session.execute(everything).stdout == f"{names}\n"
    finally:
        for session, _ in branches:
            session.close()
