"""Answers that break or stall the algebra, and what becomes of the processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thor_fast.errors import RewardError
from thor_fast.rewards import MathVerifier, grader_process

# Hours of work: in Python, and in one C call that never lets go of the GIL.
SLOW = r"\sum_{n=1}^{10^{9}} \frac{1}{n}"
STUCK = "10^{10^{10}}"


@pytest.fixture
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(workers=1, timeout_s=300) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def shared() -> Iterator[MathVerifier]:
    with MathVerifier(workers=1, timeout_s=300) as verifier:
        yield verifier
        assert set(verifier.unscored) <= {"RecursionError"}


def _pids(verifier: MathVerifier) -> list[int]:
    return [worker._process.pid for worker in verifier._live]


def _hasten(verifier: MathVerifier) -> None:
    """A deadline of half a second for the next question only, if that is too late for it."""
    (worker,) = verifier._live
    worker._timeout_s = 0.5


def _is_right(verifier: MathVerifier) -> bool:
    return verifier.match("x+x", "2x") is True and verifier.match("x+x", "3x") is False


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_late_worker_is_killed_and_the_next_answer_is_right(verifier: MathVerifier) -> None:
    assert _is_right(verifier)
    for count, hostile in enumerate((STUCK, SLOW), start=1):
        (pid,) = _pids(verifier)
        _hasten(verifier)
        assert verifier.match(hostile, "12") is None
        assert verifier.unscored == {"timeout": count}
        assert _gone(pid)
        assert _is_right(verifier)


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os')._exit(3)",
        r"\text{__import__('os')._exit(3)}",
        r"\operatorname{exit}(3)",
        r"\frac{" * 150 + "1" + "}{2}" * 150,
        "x^{" * 300 + "2" + "}" * 300,
        "\x00\x01",
        "\ud800",
        "\n{}\n",
        "\\" * 300,
        "$" * 301,
        r"\sin(" * 200 + "x" + ")" * 200,
        "1" * 5000 + "x",
        '", "equal": true}',
    ],
)
def test_no_text_is_right_or_breaks_the_worker(shared: MathVerifier, hostile: str) -> None:
    assert shared.match(hostile, "12") in (False, None)
    assert _is_right(shared)


# Runs in the place of the worker: the real one, but for what it does with the answer "y+1".
BROKEN = """
import os, signal, sys
from thor_fast.rewards import verify_worker
expression = verify_worker._expression
def _expression(text, is_real):
    if text == "y+1":
        {}
    return expression(text, is_real)
verify_worker._expression = _expression
verify_worker.main(300.0, 1 << 30)
"""


@pytest.fixture
def start_instead(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    popen = subprocess.Popen

    def replace(code: str) -> None:
        monkeypatch.setattr(
            grader_process.subprocess,
            "Popen",
            lambda _, **kwargs: popen([sys.executable, "-P", "-c", code], **kwargs),
        )

    return replace


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("os._exit(0)", "crash"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crash"),
        ("bytes(1 << 31)", "crash"),  # MemoryError: above the limit
        ("def f(): f()\n        f()", "RecursionError"),
    ],
)
def test_a_crash_is_not_scored(
    verifier: MathVerifier, start_instead, act: str, reason: str
) -> None:
    start_instead(BROKEN.format(act))
    assert verifier.match("y+1", "1+x") is None
    assert verifier.unscored == {reason: 1}
    if reason == "crash":
        assert _pids(verifier) == []
    else:
        assert _is_right(verifier)


@pytest.mark.parametrize(
    "reply",
    [
        "true",
        "[]",
        "nonsense",
        "\\udcff",
        "[" * 3000,
        "x" * 10_000,
        '{"id": 1, "equal": "yes", "reason": ""}',
        '{"id": 7, "equal": true, "reason": ""}',
        '{"equal": true}',
    ],
)
def test_garbage_is_not_scored(verifier: MathVerifier, start_instead, reply: str) -> None:
    start_instead(f"""if True:
        import sys
        sys.stdout.reconfigure(errors="surrogateescape")
        print("true", flush=True)
        sys.stdin.readline()
        print({reply!r}, flush=True)
        sys.stdin.readline()""")
    assert verifier.match("x+x", "2x") is None
    assert verifier.unscored == {"garbage": 1}
    assert _pids(verifier) == []
    start_instead("print('hello')")
    assert verifier.match("x+x", "2x") is None
    assert verifier.unscored == {"garbage": 1, "start": 1}


def test_workers_that_never_come_up_are_an_error(verifier: MathVerifier, start_instead) -> None:
    start_instead("raise SystemExit('this is why')")
    with pytest.raises(RewardError, match="no grader process comes up: start: crash; this is why"):
        verifier.match("x+x", "2x")
    assert verifier.match("1/2", "0.5") is True


def test_a_worker_that_died_and_one_that_does_not_come_up_again_are_counted(
    verifier: MathVerifier, start_instead
) -> None:
    assert _is_right(verifier)
    os.kill(_pids(verifier)[0], signal.SIGKILL)
    start_instead("print('hello')")
    assert [verifier.match("x+x", "2x") for _ in range(2)] == [None, None]
    assert verifier.unscored == {"crash": 1, "start": 1}


def test_an_interrupt_leaves_no_stale_reply(verifier: MathVerifier, monkeypatch) -> None:
    assert _is_right(verifier)
    (worker,) = verifier._live

    def interrupted(timeout_s: float) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verifier.match("x+x", "3x")
    assert _gone(worker._process.pid)
    assert _pids(verifier) == []


def test_limits_and_environment(shared: MathVerifier) -> None:
    assert _is_right(shared)
    process = Path(f"/proc/{_pids(shared)[0]}")
    variables = (process / "environ").read_bytes().rstrip(b"\0").split(b"\0")
    assert {v.partition(b"=")[0].decode() for v in variables} <= {
        *("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME"),
        *("PYTHONPATH", "PYTHONHASHSEED", "OPENBLAS_NUM_THREADS"),
    }
    rows = (process / "limits").read_text().splitlines()
    limits = {row[:26].strip(): row[26:].split()[:2] for row in rows[1:]}
    assert limits["Max address space"] == [str(1 << 30)] * 2
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    # The deadline and what it had used before, some seconds.
    assert 300 < int(limits["Max cpu time"][0]) < 400


def test_many_threads_share_few_workers() -> None:
    pairs = [(f"{i}x+{j}x", f"{i + j + i % 2}x") for i in range(2, 12) for j in range(2, 12)]
    with MathVerifier(workers=2, timeout_s=300) as verifier, ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda pair: verifier.match(*pair), pairs))
        assert len(_pids(verifier)) <= 2
    assert verdicts == [i % 2 == 0 for i in range(2, 12) for _ in range(10)]


def test_closing_ends_open_questions() -> None:
    verifier = MathVerifier(workers=1, timeout_s=300)
    assert _is_right(verifier)
    (pid,) = _pids(verifier)
    with ThreadPoolExecutor(3) as threads:
        questions = [threads.submit(verifier.match, STUCK, "12") for _ in range(3)]
        _wait_until(verifier._idle.empty)
        verifier.close()
        for question in questions:
            with pytest.raises(RewardError, match="the verifier is closed"):
                question.result(60)
    assert _gone(pid)


def test_workers_end_with_their_verifier() -> None:
    verifier = MathVerifier()
    assert _is_right(verifier)
    pids = _pids(verifier)
    del verifier
    gc.collect()
    assert all(map(_gone, pids))


@pytest.mark.parametrize("end", ["", "os._exit(0)"])
def test_workers_end_with_their_parent(end: str) -> None:
    pid = _run(f"""
        import os
        from thor_fast.rewards import MathVerifier
        verifier = MathVerifier(timeout_s=300)
        assert verifier.match("x+x", "2x")
        print(*[worker._process.pid for worker in verifier._live], flush=True)
        {end}
    """)
    _wait_until(lambda: _gone(int(pid)))


def test_a_busy_worker_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [
            *(sys.executable, "-P", "-c"),
            f"""if True:
            from thor_fast.rewards import MathVerifier
            verifier = MathVerifier(timeout_s=300)
            assert verifier.match("x+x", "2x")
            print(*[worker._process.pid for worker in verifier._live], flush=True)
            verifier.match({SLOW!r}, "12")""",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        pid = int(parent.stdout.readline())
        ticks = _ticks(pid)
        _wait_until(lambda: _ticks(pid) > ticks + 20)  # busy for a fifth of a second
        parent.kill()
    _wait_until(lambda: _gone(pid))


def _ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_the_kernel_ends_a_worker_whose_parent_cannot() -> None:
    verifier = MathVerifier(timeout_s=0.01)
    try:
        worker = verifier._start()
        worker._timeout_s = 300
        with pytest.raises(grader_process.GraderError, match="crash"):
            worker.ask("12", STUCK)
        assert worker._process.wait(60) == -signal.SIGXCPU
    finally:
        worker.kill()
        verifier.close()


def test_a_forked_child_has_workers_of_its_own() -> None:
    _run("""
        import os
        from thor_fast.rewards import MathVerifier
        with MathVerifier(timeout_s=300) as verifier:
            def pids():
                return [worker._process.pid for worker in verifier._live]
            assert verifier.match("x+x", "2x")
            before = pids()
            child = os.fork()
            if child == 0:
                assert pids() == []
                assert verifier.match("x+x", "3x") is False
                assert pids() != before
                verifier.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert verifier.match("x+x", "2x")
            assert pids() == before
    """)


def test_a_child_that_outlives_the_parent_does_not_keep_workers() -> None:
    pid, child = _run("""
        import os, sys, time
        from thor_fast.rewards import MathVerifier
        verifier = MathVerifier(timeout_s=300)
        assert verifier.match("x+x", "2x")
        (worker,) = verifier._live
        child = os.fork()
        if child == 0:
            for fd in (0, 1, 2):
                os.close(fd)
            time.sleep(600)
        print(worker._process.pid, child, flush=True)
        os._exit(0)
    """).split()
    try:
        _wait_until(lambda: _gone(int(pid)))
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_importing_rewards_loads_no_algebra() -> None:
    code = (
        "import sys, thor_fast.rewards; print({'sympy', 'math_verify', 'torch'} & {*sys.modules})"
    )
    assert _run(code) == "set()"
