"""Failures dressed up as passes: the verdict is the kernel's, not what a snippet says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .harness import Abuse


@pytest.fixture(autouse=True)
def failures_still_fail(abuse: Abuse) -> Iterator[None]:
    """After each case, a failing snippet is still reported as plain Python would."""
    yield
    after = abuse("1 / 0")
    assert (after.status, after.exit_code) == (Status.ERROR, 1)
    first, *_, last = after.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param('b\'{"status": "ok", "exit_code": 0}\\n\'', id="JSON"),
        pytest.param("bytes(4096)", id="zeros"),
        pytest.param("b'\\xff' * 4096", id="ones"),
        pytest.param("__import__('marshal').dumps(('ok', 0, b'', b''))", id="marshal"),
        pytest.param("b'@@E\\n@@M\\nok\\n'", id="code-judge-markers"),
    ],
)
def test_results_written_to_every_descriptor(abuse: Abuse, message: str) -> None:
    """If any inherited descriptor led to the supervisor, it would read this."""
    result = abuse(f"""
        import os, socket
        for fd in range(256):
            for _ in range(3):
                try: os.write(fd, {message})
                except OSError: pass
            try: socket.send_fds(socket.socket(fileno=os.dup(fd)), [{message}], [0])
            except OSError: pass
        os._exit(3)
    """)
    assert (result.status, result.exit_code) == (Status.ERROR, 3)


def test_only_the_standard_streams_are_open(abuse: Abuse) -> None:
    """No descriptor of zygote or supervisor (CVE-2024-21626, CVE-2016-9962: leaked ones)."""
    result = abuse("""
        import os
        found = []
        for fd in range(1024):
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError: pass
        print(found, [os.path.isdir(f'/proc/self/fd/{fd}') for fd in found])
    """)
    assert result.stdout == "[0, 1, 2] [False, False, False]\n"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        pytest.param(
            "import os, sys\nos._exit = sys.exit = lambda *_: None\nraise SystemExit(3)",
            3,
            id="exit-functions",
        ),
        pytest.param("import sys\nsys.excepthook = lambda *_: None\n1 / 0", 1, id="excepthook"),
        pytest.param(
            "import traceback\ntraceback.print_exception = lambda *_, **k: 1 / 0\n1 / 0",
            None,
            id="traceback",
        ),
        pytest.param(
            "import builtins\nbuiltins.print = builtins.isinstance = None\n1 / 0",
            None,
            id="builtins",
        ),
        pytest.param(
            "import builtins\nbuiltins.BaseException = builtins.SystemExit = int\n1 / 0",
            None,
            id="exception-classes",
        ),
        pytest.param(
            "import builtins\nfor n in list(vars(builtins)):\n"
            "    if n != '__import__': delattr(builtins, n)\n1 / 0",
            None,
            id="no-builtins",
        ),
        pytest.param(
            "import marshal\nmarshal.loads = marshal.dumps = None\n1 / 0", 1, id="marshal"
        ),
        pytest.param("import sys\nsys.modules.clear()\n1 / 0", 1, id="modules-cleared"),
        pytest.param("import sys\nsys.stderr = sys.stdout = None\n1 / 0", 1, id="streams-gone"),
        pytest.param(
            "import sys\nsys.stdout.close(); sys.stderr.close()\n1 / 0", 1, id="streams-closed"
        ),
        pytest.param(
            "import threading\nthreading._shutdown = None\n1 / 0", 1, id="thread-shutdown"
        ),
        pytest.param("import sys\nsys.setprofile(lambda *_: 1 / 0)\n1 / 0", 1, id="profiler"),
        pytest.param(
            "import sys\nsys.settrace(lambda *_: 1 / 0)\ndef f(): pass\nf()", 1, id="tracer"
        ),
        pytest.param(
            "import linecache\nlinecache.cache = None\nlinecache.getline = 1\n1 / 0",
            None,
            id="linecache",
        ),
        pytest.param(
            "import gc\ngc.callbacks.append(lambda *_: 1 / 0)\ngc.collect()\n1 / 0",
            1,
            id="collector-callbacks",
        ),
        pytest.param(
            "import atexit\natexit.register(lambda: 1 / 0)\nraise SystemExit(4)",
            None,
            id="atexit-that-raises",
        ),
        pytest.param(
            "import sys\nsys.unraisablehook = sys.displayhook = None\n1 / 0", 1, id="hooks"
        ),
        pytest.param(
            "import sys\nsys.addaudithook(lambda *_: 1 / 0)\nopen('f')",
            None,
            id="audit-hook-that-raises",
        ),
        pytest.param(
            "import io\nio.TextIOWrapper.flush = None\n1 / 0", None, id="flush-of-streams"
        ),
        pytest.param(
            "import sys\nsys.setrecursionlimit(5 + 40)\ndef f(): f()\nf()",
            1,
            id="recursion-limit-lowered",
        ),
    ],
)
def test_patched_interpreter_still_fails(abuse: Abuse, code: str, exit_code: int | None) -> None:
    """Whatever of Python is replaced, a failure stays one (``None``: with any exit code)."""
    result = abuse(code)
    assert result.passed is False, result
    assert exit_code is None or result.exit_code == exit_code, result


def test_frames_of_ours_patched(abuse: Abuse) -> None:
    """Our own functions are a few frames up; replacing them changes this process only."""
    result = abuse("""
        import sys
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            for name, value in list(frame.f_globals.items()):
                if callable(value) and not name.startswith('__'):
                    frame.f_globals[name] = lambda *_, **__: 0
        raise SystemExit(3)
    """)
    assert result.status in (Status.OK, Status.ERROR)


def test_pages_shared_with_the_zygote(abuse: Abuse) -> None:
    """Whatever is mapped shared and writable is a way out; at most it may say 'out of memory'."""
    result = abuse(
        """
        for line in open('/proc/self/maps'):
            span, mode, *_ = line.split()
            if mode.startswith('rw') and mode.endswith('s'):
                start, end = (int(x, 16) for x in span.split('-'))
                ctypes.memset(start, 1, end - start)
        os._exit(3)
        """,
        raw=True,
    )
    assert result.status in (Status.ERROR, Status.MEMORY)
    assert result.exit_code == 3


def test_exit_inside_atexit(abuse: Abuse) -> None:
    """os._exit in an exit handler: the exit code is the last one given, as in plain Python."""
    result = abuse("import atexit, os\natexit.register(os._exit, 6)\nprint('x')")
    assert (result.status, result.exit_code, result.stdout) == (Status.ERROR, 6, "x\n")


def test_early_success_skips_the_tests_below(abuse: Abuse) -> None:
    """os._exit(0) before the assertions (reward hacking): a pass, but visibly without output."""
    result = abuse("import os\nos._exit(0)\nassert False\nprint('all tests passed')")
    assert (result.status, result.stdout) == (Status.OK, "")


def test_traceback_claims_to_be_another_file(abuse: Abuse) -> None:
    """compile() with a forged file name shows in the text only."""
    result = abuse("exec(compile('1 / 0', '/etc/passwd', 'exec'))")
    assert (result.status, result.exit_code) == (Status.ERROR, 1)
    assert "root:" not in result.stderr
