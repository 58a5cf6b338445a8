"""What every sandbox backend must do. A backend's test module subclasses ``SandboxContract``.

After every failure the same sandbox must run one more snippet: the fixture checks it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from thor_fast.errors import SandboxError
from thor_fast.types import ExecutionRequest, Status

from .contract_world import WorldContract

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from thor_fast.sandbox.base import Sandbox

MIB = 1 << 20


class SandboxContract(WorldContract):
    """Its module gives the fixtures ``shared`` (an open sandbox) and ``fresh`` (a new one)."""

    @pytest.fixture
    def sandbox(self, shared: Sandbox) -> Iterator[Sandbox]:
        yield shared
        after = shared.execute("print('alive')")
        assert (after.status, after.stdout) == (Status.OK, "alive\n")

    # --- endings --------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("code", "status", "exit_code"),
        [
            ("print(6 * 7)", Status.OK, 0),
            ("", Status.OK, 0),
            ("x = 1", Status.OK, 0),
            ("import sys; sys.exit()", Status.OK, 0),
            ("import sys; sys.exit(0)", Status.OK, 0),
            ("import sys; sys.exit(3)", Status.ERROR, 3),
            ("import sys; sys.exit(-1)", Status.ERROR, 255),
            ("import sys; sys.exit('no')", Status.ERROR, 1),
            ("raise SystemExit(4)", Status.ERROR, 4),
            ("import os; os._exit(5)", Status.ERROR, 5),
            ("1 / 0", Status.ERROR, 1),
            ("x =", Status.ERROR, 1),
            ("print('a')\n  print('b')", Status.ERROR, 1),
            ("print('a'\n", Status.ERROR, 1),
            ("x = 'a\0b'", Status.ERROR, 1),
            ("raise KeyboardInterrupt", Status.ERROR, 1),
            ("raise ExceptionGroup('g', [ValueError(1)])", Status.ERROR, 1),
            ("import nonexistent_module", Status.ERROR, 1),
        ],
    )
    def test_endings(self, sandbox: Sandbox, code: str, status: Status, exit_code: int) -> None:
        result = sandbox.execute(code)
        assert (result.status, result.exit_code, result.signal) == (status, exit_code, None)
        assert result.passed is (status is Status.OK)
        assert result.error == ""

    def test_silent_success_passes(self, sandbox: Sandbox) -> None:
        result = sandbox.execute("x = sum(range(10))")
        assert (result.passed, result.stdout, result.stderr) == (True, "", "")

    def test_infinite_loop_is_a_timeout(self, sandbox: Sandbox) -> None:
        started = time.monotonic()
        result = sandbox.execute(ExecutionRequest("print('before')\nwhile True: pass", timeout_s=2))
        assert result.status is Status.TIMEOUT
        assert result.stdout == "before\n", "output before the limit is kept"
        assert 2 <= result.wall_s < 30
        assert time.monotonic() - started < 60

    def test_sleep_is_a_timeout_that_costs_no_cpu(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(ExecutionRequest("import time; time.sleep(60)", timeout_s=2))
        assert result.status is Status.TIMEOUT
        assert result.cpu_s < 1

    def test_cpu_limit(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(ExecutionRequest("while True: pass", timeout_s=200, cpu_s=1))
        assert result.status is Status.TIMEOUT
        assert 0.7 < result.cpu_s < 3  # the kernel samples: a tick or two may be missing

    def test_three_gigabytes_are_a_memory_error(self, sandbox: Sandbox) -> None:
        result = sandbox.execute("print('start')\nx = bytearray(3 << 30)\nprint(len(x))")
        assert result.status is Status.MEMORY
        assert result.stdout == "start\n"
        assert "MemoryError" in result.stderr

    def test_a_caught_memory_error_is_no_failure(self, sandbox: Sandbox) -> None:
        code = "try:\n    bytearray(3 << 30)\nexcept MemoryError:\n    print('coped')"
        result = sandbox.execute(code)
        assert (result.status, result.stdout) == (Status.OK, "coped\n")

    def test_memory_within_the_limit_is_granted_and_accounted(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(
            ExecutionRequest("x = bytearray(200 << 20)\nprint(len(x))", memory_bytes=300 * MIB)
        )
        assert result.status is Status.OK, result.stderr
        assert 200 * MIB <= result.peak_memory_bytes < 300 * MIB

    def test_ten_megabytes_of_output(self, sandbox: Sandbox) -> None:
        result = sandbox.execute("print('head')\nprint('x' * 10_000_000)\nprint('tail')")
        assert result.status is Status.OUTPUT
        assert result.truncated
        assert result.stdout.startswith("head\n")
        assert result.stdout.endswith("tail\n")
        assert MIB <= len(result.stdout) < MIB + 100

    def test_endless_output_is_killed_long_before_the_time_limit(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(ExecutionRequest("while True: print('y' * 1000)", timeout_s=200))
        assert (result.status, result.truncated) == (Status.OUTPUT, True)
        assert result.wall_s < 100

    def test_stderr_is_capped_too(self, sandbox: Sandbox) -> None:
        request = ExecutionRequest(
            "import sys\nsys.stderr.write('e' * 5000)", max_output_bytes=1000
        )
        result = sandbox.execute(request)
        assert (result.status, result.truncated) == (Status.OUTPUT, True)
        assert len(result.stderr) < 1100

    def test_fork_bomb_is_capped(self, sandbox: Sandbox) -> None:
        result = sandbox.execute(
            ExecutionRequest("import os\nwhile True: os.fork()", timeout_s=3, max_processes=16)
        )
        assert result.status in (Status.ERROR, Status.TIMEOUT)
        assert result.wall_s < 30

    def test_process_limit_is_an_error_the_snippet_sees(self, sandbox: Sandbox) -> None:
        code = """
import os, signal
children = []
try:
    while True:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)
except BlockingIOError:
    print(len(children))
"""
        result = sandbox.execute(ExecutionRequest(code, max_processes=8))
        assert (result.status, result.stdout) == (Status.OK, "7\n")

    def test_killing_the_parent_harms_nobody(self, sandbox: Sandbox) -> None:
        """Whether the attempt is ignored or refused is the backend's."""
        code = "import os, signal\nprint('x')\nos.kill(os.getppid(), signal.SIGKILL)"
        result = sandbox.execute(code)
        assert result.stdout == "x\n"
        assert result.status is Status.OK or "PermissionError" in result.stderr

    @pytest.mark.parametrize(
        ("code", "signal"),
        [
            ("import os; os.kill(os.getpid(), 9)", 9),
            ("import os; os.kill(os.getpid(), 15)", 15),
            ("import os; os.abort()", 6),
            ("import ctypes; ctypes.string_at(0)", 11),
        ],
    )
    def test_death_by_signal(self, sandbox: Sandbox, code: str, signal: int) -> None:
        result = sandbox.execute(code)
        assert (result.status, result.signal, result.exit_code) == (Status.ERROR, signal, None)

    def test_nothing_survives_the_snippet(self, sandbox: Sandbox) -> None:
        code = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
print('parent done')
"""
        started = time.monotonic()
        result = sandbox.execute(code)
        assert (result.status, result.stdout) == (Status.OK, "parent done\n")
        assert time.monotonic() - started < 60, "a daemon that holds stdout does not delay the end"

    # --- text -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "code",
        [
            "def f(n):\n    return 1 / n\n\nprint(f(1))\nf(0)\n",
            "x =\n",
            "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('outer') from e\n",
            "import json\njson.loads('{')\n",
            "import sys\nsys.exit('bye')\n",
            "class E(Exception): pass\nraise E('own')\n",
            "print('out')\nassert 1 == 2, 'unequal'\n",
            "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])\n",
        ],
    )
    def test_text_is_that_of_plain_python(
        self, sandbox: Sandbox, tmp_path: Path, code: str
    ) -> None:
        (tmp_path / "main.py").write_text(code)
        plain = subprocess.run(
            [sys.executable, "-I", "-S", "main.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        result = sandbox.execute(code)
        # As a script Python prints the absolute path of its file.
        assert result.stderr == plain.stderr.replace(f"{tmp_path}/", "")
        assert (result.stdout, result.exit_code) == (plain.stdout, plain.returncode)

    def test_endless_recursion(self, sandbox: Sandbox) -> None:
        result = sandbox.execute("def f():\n    f()\nf()\n")
        assert (result.status, result.exit_code) == (Status.ERROR, 1)
        assert "RecursionError: maximum recursion depth exceeded" in result.stderr

    def test_unicode_bytes_and_surrogates(self, sandbox: Sandbox) -> None:
        assert sandbox.execute("print('Grüße, 世界 🎉')").stdout == "Grüße, 世界 🎉\n"
        raw = sandbox.execute(r"import sys; sys.stdout.buffer.write(b'a\xff\0b')")
        assert (raw.status, raw.stdout) == (Status.OK, "a\ufffd\0b")
        assert sandbox.execute("x = '\ud800'\nprint(len(x))").status in (Status.OK, Status.ERROR)

    def test_stdin(self, sandbox: Sandbox) -> None:
        request = ExecutionRequest("print(input(), input())", stdin="é\n2\n")
        assert sandbox.execute(request).stdout == "é 2\n"
        empty = sandbox.execute("input()")
        assert (empty.status, "EOFError" in empty.stderr) == (Status.ERROR, True)
        big = ExecutionRequest("import sys; print(len(sys.stdin.read()))", stdin=b"z" * 3_000_000)
        assert sandbox.execute(big).stdout == "3000000\n"

    def test_huge_source(self, sandbox: Sandbox) -> None:
        code = "x = 0\n" + "x += 1\n" * 100_000 + "print(x)"
        result = sandbox.execute(ExecutionRequest(code, timeout_s=200))
        assert (result.status, result.stdout) == (Status.OK, "100000\n")

    def test_order_is_kept_and_flushed_at_exit(self, sandbox: Sandbox) -> None:
        code = """
import atexit, threading, time
atexit.register(print, 'atexit')
said = threading.Event()
threading.Thread(target=lambda: (said.wait(), time.sleep(0.05), print('thread'))).start()
print('main', end=' ')
said.set()
"""
        assert sandbox.execute(code).stdout == "main thread\natexit\n"

    # --- the world a snippet sees ---------------------------------------------------------------

    def test_files_and_env_in(self, sandbox: Sandbox) -> None:
        request = ExecutionRequest(
            "import os, pkg.mod\nprint(open('data.txt').read(), pkg.mod.x, os.environ['K'])",
            files={"data.txt": b"hello", "pkg/mod.py": b"x = 5"},
            env={"K": "v"},
        )
        assert sandbox.execute(request).stdout == "hello 5 v\n"

    @pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "", "a\0b"])
    def test_file_names_that_escape_are_refused(self, sandbox: Sandbox, name: str) -> None:
        with pytest.raises(ValueError, match="expected a relative path"):
            sandbox.execute(ExecutionRequest("", files={name: b""}))

    @pytest.mark.parametrize(
        "limits",
        [
            {"timeout_s": 0},
            {"timeout_s": float("inf")},
            {"timeout_s": float("nan")},
            {"timeout_s": 1e12},
            {"timeout_s": 1e300},
            {"cpu_s": -1.0},
            {"cpu_s": float("inf")},
            {"memory_bytes": 0},
            {"max_output_bytes": 2**70},
            {"max_processes": 2**32},
        ],
    )
    def test_senseless_limits_are_refused(self, sandbox: Sandbox, limits: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="expected > 0 and at most"):
            sandbox.execute(ExecutionRequest("", **limits))

    @pytest.mark.parametrize(
        "limits", [{"memory_bytes": 1e9}, {"max_processes": "4"}, {"timeout_s": True}]
    )
    def test_limits_of_the_wrong_type_are_refused(
        self, sandbox: Sandbox, limits: dict[str, object]
    ) -> None:
        with pytest.raises(TypeError, match=r"expected a (whole )?number"):
            sandbox.execute(ExecutionRequest("", **limits))

    def test_files_larger_than_the_working_directory_are_refused(self, sandbox: Sandbox) -> None:
        request = ExecutionRequest("", files={"a": bytes(20 << 20), "b": bytes(20 << 20)})
        with pytest.raises(ValueError, match="files hold 41943040 bytes, expected at most"):
            sandbox.execute(request)

    def test_unknown_language_is_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(ValueError, match="'cobol', expected 'python'"):
            sandbox.execute(ExecutionRequest("", language="cobol"))

    def test_no_state_reaches_the_next_snippet(self, sandbox: Sandbox) -> None:
        first = """
import builtins, os, math, sys
builtins.leak = 1
math.pi = 3
os.environ['LEAK'] = '1'
sys.path.append('/leak')
for path in ('leak', '/tmp/leak', '/dev/shm/leak'):
    open(path, 'w').write('x')
"""
        second = """
import builtins, math, os, sys
print(hasattr(builtins, 'leak'), math.pi > 3.1, 'LEAK' in os.environ, '/leak' in sys.path)
print([os.path.exists(p) for p in ('leak', '/tmp/leak', '/dev/shm/leak')])
"""
        assert sandbox.execute(first).status is Status.OK
        assert sandbox.execute(second).stdout == ("False True False False\n[False, False, False]\n")

    def test_random_streams_differ(self, sandbox: Sandbox) -> None:
        code = "import random, uuid\nprint(random.random(), uuid.uuid4())"
        outputs = {r.stdout for r in sandbox.execute_batch([code] * 6)}
        assert len(outputs) == 6

    def test_threads_subprocesses_and_multiprocessing(self, sandbox: Sandbox) -> None:
        code = """
import multiprocessing, subprocess, sys, threading
results = []
threads = [threading.Thread(target=results.append, args=(i,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(results))
print(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout.strip())
print(subprocess.run([sys.executable, '-I', '-S', '-c', 'print(7)'], capture_output=True).stdout)
with multiprocessing.get_context('fork').Pool(2) as pool:
    print(pool.map(abs, [-1, -2, -3]))
"""
        result = sandbox.execute(code)
        assert result.stdout == "[0, 1, 2, 3]\nhi\nb'7\\n'\n[1, 2, 3]\n", result.stderr

    def test_asyncio_and_numpy_work(self, sandbox: Sandbox) -> None:
        code = """
import asyncio
import numpy as np
async def f(): await asyncio.sleep(0.01); return 1
print(asyncio.run(f()), int(np.linalg.matrix_rank(np.eye(50))), np.arange(3).sum())
"""
        result = sandbox.execute(code)
        assert result.stdout == "1 50 3\n", result.stderr

    # --- calling it -----------------------------------------------------------------------------

    def test_batch_keeps_the_order(self, sandbox: Sandbox) -> None:
        requests = [f"import time; time.sleep({0.02 * (i % 3)}); print({i})" for i in range(20)]
        results = sandbox.execute_batch(requests)
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(20)]
        assert sandbox.execute_batch([]) == []

    async def test_submit_does_not_block_the_loop(self, sandbox: Sandbox) -> None:
        request = ExecutionRequest("import time; time.sleep(600)", timeout_s=200)
        task = asyncio.create_task(sandbox.submit(request))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not task.done(), "the loop went round while the snippet ran"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_a_thousand_in_flight(self, sandbox: Sandbox) -> None:
        results = await asyncio.gather(*(sandbox.submit(f"print({i})") for i in range(1000)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(1000)]

    async def test_cancelling_kills(self, sandbox: Sandbox) -> None:
        task = asyncio.create_task(
            sandbox.submit(ExecutionRequest("while True: pass", timeout_s=600))
        )
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # All slots are free again: more snippets than slots finish at once.
        results = await asyncio.gather(*(sandbox.submit("print(1)") for _ in range(8)))
        assert all(r.status is Status.OK for r in results)

    async def test_closing_answers_who_waits(self, fresh: Sandbox) -> None:
        task = asyncio.create_task(fresh.submit("import time; time.sleep(600)"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(fresh.close)
        result = await task
        assert (result.status, result.passed) == (Status.INFRA, None)
        assert "closed" in result.error

    def test_closed_is_an_error(self, fresh: Sandbox) -> None:
        with fresh as sandbox:
            assert sandbox.execute("print(1)").stdout == "1\n"
        fresh.close()
        with pytest.raises(SandboxError, match="closed"):
            fresh.execute("print(1)")
