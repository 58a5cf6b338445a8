"""Work that nothing inside the interpreter can interrupt, and ends that never come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("10 ** 10 ** 8", id="integer-power-in-C"),
        pytest.param("sum(range(10 ** 12))", id="sum-in-C"),
        pytest.param(
            "import collections, itertools\ncollections.deque(itertools.count(), maxlen=0)",
            id="endless-iterator-in-C",
        ),
        pytest.param("import re; re.match('(a+)+$', 'a' * 64 + 'b')", id="regex-backtracking"),
        pytest.param(
            "{i * (2 ** 61 - 1): None for i in range(10 ** 6)}", id="hash-collisions-oCERT-2011-003"
        ),
        pytest.param("10 ** 9 in iter(int, 1)", id="containment-test-in-C"),
        pytest.param(
            "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
            id="exception-whose-text-takes-for-ever",
        ),
        pytest.param(
            "class C:\n    def __del__(self):\n        while True: self.__class__.__mro__\nC()",
            id="finaliser-that-never-returns",
        ),
        pytest.param(
            "import threading; threading.Lock().acquire() and threading.Event().wait()",
            id="deadlock",
        ),
        pytest.param(
            "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
            id="thread-that-outlives-main",
        ),
        pytest.param(
            "import atexit, time; atexit.register(time.sleep, 99)", id="atexit-that-sleeps"
        ),
        pytest.param(
            "import sys\nclass O:\n    def write(self, _): pass\n"
            "    def flush(self):\n        while True: pass\nsys.stdout = O()",
            id="stdout-whose-flush-never-returns",
        ),
        pytest.param(
            "import sys\ndef hook(*_):\n    while True: pass\nsys.excepthook = hook\n1 / 0",
            id="excepthook-that-never-returns",
        ),
        pytest.param(
            "def f():\n    try: f()\n    finally: f()\nf()", id="finally-doubles-recursion"
        ),
        pytest.param(
            "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
            id="bare-except",
        ),
        pytest.param("import os; r, w = os.pipe(); os.read(r, 1)", id="read-from-an-empty-pipe"),
        pytest.param("import os; os.mkfifo('f'); open('f')", id="open-of-a-fifo"),
        pytest.param("import time; time.sleep(1e9)", id="sleep-for-decades"),
        pytest.param(
            "import faulthandler, sys; faulthandler.dump_traceback_later(0.01, repeat=True)"
            "\nwhile True: pass",
            id="watchdog-thread-that-prints",
        ),
    ],
)
def test_endless_work_is_a_timeout(abuse: Abuse, code: str) -> None:
    """Signal handlers of Python run between bytecodes only; the kill comes from outside."""
    result = abuse(code, timeout_s=0.35, memory_bytes=1 << 30)
    assert result.status is Status.TIMEOUT
    assert result.wall_s >= 0.35


def test_output_before_the_kill_is_kept(abuse: Abuse) -> None:
    """Uninterruptible or not: what was printed counts."""
    result = abuse("print('computing')\n10 ** 10 ** 8", timeout_s=0.4)
    assert (result.status, result.stdout) == (Status.TIMEOUT, "computing\n")


def test_decimal_text_of_a_huge_integer(abuse: Abuse) -> None:
    """Quadratic conversion between int and str (CVE-2020-10735): the interpreter's own limit."""
    result = abuse("int('9' * 10 ** 6)", timeout_s=2)
    assert (result.status, "Exceeds the limit" in result.stderr) == (Status.ERROR, True)


def test_clocks_frozen_or_patched_do_not_stop_time(abuse: Abuse) -> None:
    """The clock that counts is outside."""
    result = abuse(
        """
        import time
        time.time = time.monotonic = time.perf_counter = lambda: 0.0
        while time.time() < 1: pass
        """,
        timeout_s=0.4,
    )
    assert result.status is Status.TIMEOUT
