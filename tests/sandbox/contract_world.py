"""The part of the contract about what a snippet may use: packages, threads, processes, any text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.types import ExecutionRequest, Status

if TYPE_CHECKING:
    from thor_fast.sandbox.base import Sandbox


POOL = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(abs, range(-99, 0))))
"""
DAEMON_THREAD = """
import queue, threading
found = queue.Queue()
threading.Thread(target=found.put, args=(1,), daemon=True).start()
print(found.get())
"""


class WorldContract:
    """Its module gives the fixture ``sandbox``."""

    @pytest.mark.parametrize(
        ("package", "code", "stdout"),
        [
            ("numpy", "import numpy as np\nprint(np.linalg.det(np.eye(3)))", "1.0\n"),
            ("numpy", "from numpy import random\nprint(random.default_rng(0).integers(9))", "7\n"),
            ("sympy", "from sympy import *\nx = Symbol('x')\nprint(integrate(x, x))", "x**2/2\n"),
            ("scipy", "from scipy import stats\nprint(stats.norm.cdf(0))", "0.5\n"),
            ("scipy", "from scipy.optimize import brentq\nprint(brentq(lambda x: x, -1, 2))", None),
            ("pandas", "import pandas as pd\nprint(pd.Series([1, 2]).sum())", "3\n"),
            ("mpmath", "import mpmath\nprint(mpmath.mpf(1) / 4)", "0.25\n"),
        ],
    )
    def test_the_scientific_stack(
        self, sandbox: Sandbox, package: str, code: str, stdout: str | None
    ) -> None:
        pytest.importorskip(package)
        result = sandbox.execute(ExecutionRequest(code, timeout_s=60))
        assert (result.status, result.stderr) == (Status.OK, ""), result
        assert stdout is None or result.stdout == stdout

    @pytest.mark.parametrize(
        ("code", "stdout"),
        [
            (POOL, "4950\n"),
            (DAEMON_THREAD, "1\n"),
            ("import os\npid = os.fork()\nif not pid: os._exit(3)\nprint(os.wait()[1])", "768\n"),
            ("import os\nr, w = os.pipe()\nos.write(w, b'x')\nprint(os.read(r, 1))", "b'x'\n"),
            ("import subprocess as s\nprint(s.check_output(['cat'], input=b'in'))", "b'in'\n"),
            ("import subprocess as s\nprint(s.run('exit 3', shell=True).returncode)", "3\n"),
            ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'xy'))", "2\n"),
            ("import sqlite3 as q\nprint(*q.connect('').execute('select 1 + 1'))", "(2,)\n"),
        ],
    )
    def test_threads_processes_and_files(self, sandbox: Sandbox, code: str, stdout: str) -> None:
        result = sandbox.execute(code)
        assert (result.status, result.stdout) == (Status.OK, stdout), result

    @pytest.mark.parametrize(
        ("code", "stdout"),
        [
            (r"import sys; sys.stdout.buffer.write(b'\x80\xe2\x82')", "\ufffd\ufffd"),
            (r"print('a\0b')", "a\0b\n"),
            (r"print('\r\n\x1b[0m', end='')", "\r\n\x1b[0m"),
            (r"print('\U0010ffff\u0301')", "\U0010ffff\u0301\n"),
            ("print('e\u0301', len('e\u0301'))", "e\u0301 2\n"),
            ("\u03c0 = 3\nprint(\u03c0)", "3\n"),
            ("print(1)\r\nif True:\r\n\tprint(2)\r\n", "1\n2\n"),
            (r"print(ascii('\ud800'))", "'\\ud800'\n"),
        ],
    )
    def test_text_of_any_kind(self, sandbox: Sandbox, code: str, stdout: str) -> None:
        result = sandbox.execute(code)
        assert (result.status, result.stdout) == (Status.OK, stdout), result

    def test_a_surrogate_cannot_be_printed(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(r"print('before'); print('\ud800')")
        assert (result.status, result.stdout) == (Status.ERROR, "before\n")
        assert "UnicodeEncodeError" in result.stderr

    @pytest.mark.parametrize("stdin", [b"\xff\0\n", "\u20ac\0\n", "", b""])
    def test_stdin_is_bytes_as_given(self, sandbox: Sandbox, stdin: str | bytes) -> None:
        code = "import sys; print(sys.stdin.buffer.read())"
        expected = stdin.encode() if isinstance(stdin, str) else stdin
        result = sandbox.execute(ExecutionRequest(code, stdin=stdin))
        assert result.stdout == f"{expected!r}\n", result

    @pytest.mark.parametrize(
        "code",
        [
            *("x = (", "if True:", "def f(:", "'''", "x = 1\n y = 2", "return 1", "print 'x'"),
            *("a b", "f'{", "for", "\\", "0777", "await x", "nonlocal x", "x = 1 +\n", "\x01"),
        ],
    )
    def test_source_that_does_not_compile(self, sandbox: Sandbox, code: str) -> None:
        result = sandbox.execute(f"print('never')\n{code}")
        assert (result.status, result.stdout, result.exit_code) == (Status.ERROR, "", 1)
        assert "Error: " in result.stderr
