"""Native code: interpreter corrupted from within, crashes of all kinds, numpy out of bounds."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize(
    ("code", "death"),
    [
        pytest.param("import ctypes; ctypes.string_at(1)", {11}, id="bad-pointer"),
        pytest.param("import ctypes; ctypes.CFUNCTYPE(None)(0)()", {11}, id="jump-to-zero"),
        pytest.param(
            "import ctypes; libc = ctypes.CDLL(None); libc.free.argtypes = [ctypes.c_void_p]\n"
            "libc.free(0x1234)",
            {6, 11},
            id="free-of-garbage",
        ),
        pytest.param(
            "import ctypes; libc = ctypes.CDLL(None); m = libc.malloc\n"
            "m.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
            "p = m(5000); libc.free(p); libc.free(p); libc.free(p)",
            {6, 11},
            id="double-free",
        ),
        pytest.param(
            "import ctypes\nctypes.memset(id(int), 0, 400)\nint('1')",
            {6, 11},
            id="type-object-zeroed",
        ),
        pytest.param(
            "import ctypes\nctypes.memset(id(None) + 8, 0xFF, 8)\nx = None.foo",
            {6, 11},
            id="type-of-None-overwritten",
        ),
        pytest.param(
            "import ctypes, sys\nctypes.pythonapi._Py_Dealloc(ctypes.py_object(()))\n"
            "ctypes.pythonapi.Py_FatalError(b'bye')",
            {6, 11},
            id="fatal-error",
        ),
        pytest.param(
            "import opcode\npops = bytes([opcode.opmap['POP_TOP'], 0] * 64)\n"
            "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=pops)\nf()",
            {4, 6, 11},
            id="forged-bytecode",
        ),
        pytest.param(
            "import faulthandler; faulthandler._stack_overflow()", {11}, id="stack-overflow-in-C"
        ),
        pytest.param("import faulthandler; faulthandler._sigfpe()", {8}, id="SIGFPE"),
        pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGILL)", {4}, id="SIGILL"),
        pytest.param(
            "import mmap, os\nf = open('f', 'w+b'); f.truncate(4096)\n"
            "m = mmap.mmap(f.fileno(), 4096); f.truncate(0); m[0]",
            {7},
            id="SIGBUS-past-the-end",
        ),
        pytest.param(
            "import mmap\nf = open('/dev/shm/f', 'w+b'); f.truncate(60 << 20)\n"
            "g = open('/dev/shm/g', 'w+b'); g.truncate(60 << 20)\n"
            "for h in (f, g):\n    m = mmap.mmap(h.fileno(), 60 << 20)\n"
            "    for i in range(0, 60 << 20, 4096): m[i] = 1",
            {7},
            id="SIGBUS-tmpfs-overcommitted-snekbox",
        ),
    ],
)
def test_crash(abuse: Abuse, code: str, death: set[int]) -> None:
    """The process dies by its own signal, and it alone."""
    result = abuse(code, memory_bytes=512 << 20)
    assert result.status is Status.ERROR
    assert result.signal in death


def test_reference_count_of_none(abuse: Abuse) -> None:
    """ctypes.memset on the count of None: the zygote's None is another page by then."""
    result = abuse("""
        import ctypes
        ctypes.memset(id(None), 0, 8)
        for _ in range(10):
            x = None; del x
        print(None)
    """)
    assert result.status in (Status.OK, Status.ERROR)
    assert result.signal in (None, signal.SIGABRT, signal.SIGSEGV)


def test_small_integers_redefined(abuse: Abuse) -> None:
    """1 becomes 2 for the whole interpreter; the next one must count as before."""
    result = abuse(
        """
        offset = int.__basicsize__
        ctypes.memmove(id(1) + offset, id(2) + offset, 4)
        os.write(1, b'descriptor 1 is 2')
        os._exit(0)
        """,
        raw=True,
    )
    assert (result.status, result.stdout, result.stderr) == (Status.OK, "", "descriptor 1 is 2")
    assert abuse("print(1, 1 + 1)").stdout == "1 2\n"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("def f(): f()\nf()", id="Python"),
        pytest.param("class C:\n    def __repr__(self): return repr(self)\nrepr(C())", id="repr"),
        pytest.param("x = []\nfor _ in range(200_000): x = [x]\nrepr(x)", id="nested-list"),
        pytest.param("import json\njson.loads('[' * 200_000)", id="json"),
        pytest.param("import re\nre.compile('(' * 20_000 + ')' * 20_000)", id="regex"),
        pytest.param(
            "import pickle\nx = []\nfor _ in range(100_000): x = [x]\npickle.dumps(x)", id="pickle"
        ),
        pytest.param(
            "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
            id="Python-without-limit",
        ),
        pytest.param(
            "import sys\nsys.setrecursionlimit(10 ** 9)\n"
            "class C:\n    def __getattr__(self, n): return getattr(self, n)\nC().x",
            id="C-without-limit",
        ),
        pytest.param("x = ()\nfor _ in range(500_000): x = (x,)\nhash(x)", id="hash"),
        pytest.param(
            "x = ()\nfor _ in range(1_000_000): x = (x,)\ndel x\nraise SystemExit(1)",
            id="destructor-trashcan",
        ),
    ],
)
def test_recursion(abuse: Abuse, code: str) -> None:
    """Ends as RecursionError, as a stack overflow, at the memory limit or in time; never passes."""
    result = abuse(code, memory_bytes=1 << 30, timeout_s=1.5)
    assert result.status in (Status.ERROR, Status.MEMORY, Status.TIMEOUT)
    assert result.signal in (None, signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "statuses"),
    [
        pytest.param("np.zeros(1 << 40)", {Status.MEMORY}, id="eight-tebibytes"),
        pytest.param("np.ones(1 << 27)", {Status.MEMORY}, id="one-gibibyte"),
        pytest.param("np.arange(1 << 62)", {Status.MEMORY, Status.ERROR}, id="arange"),
        pytest.param(
            "a = np.ones((5000, 5000), bool)\nnp.einsum('ij,jk,kl->il', a, a, a, dtype=float)",
            {Status.MEMORY, Status.TIMEOUT},
            id="einsum",
        ),
        pytest.param(
            "x = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 40,), (8,))\nx[1 << 39]",
            {Status.ERROR},
            id="as_strided-read",
        ),
        pytest.param(
            "x = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 40,), (-4096,))\nx[:] = 1",
            {Status.ERROR},
            id="as_strided-write",
        ),
        pytest.param(
            "np.memmap('f', 'u1', 'w+', shape=1 << 40)", {Status.ERROR}, id="memmap-sparse"
        ),
        pytest.param(
            "np.memmap(np.__file__, 'u1', 'r+')", {Status.ERROR}, id="memmap-of-the-library"
        ),
        pytest.param(
            "np.linalg.svd(np.random.rand(4000, 4000))",
            {Status.TIMEOUT, Status.MEMORY},
            id="svd-in-LAPACK",
        ),
        pytest.param(
            "np.array([object()] * 10, object).view('u8')[:] = 1",
            {Status.ERROR},
            id="objects-as-numbers",
        ),
        pytest.param(
            "np.frombuffer(b'constant', 'u1').flags.writeable = True",
            {Status.ERROR},
            id="writable-constant",
        ),
        pytest.param("np.load('f.npy', allow_pickle=True)", {Status.ERROR}, id="pickle-that-exits"),
    ],
)
def test_numpy(abuse: Abuse, code: str, statuses: set[Status]) -> None:
    """Giant arrays, views past the end, work in C that no signal interrupts."""
    pickled = b"cos\n_exit\n(I3\ntR."
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled
    result = abuse(f"import numpy as np\n{code}", timeout_s=1.5, files={"f.npy": array})
    assert result.status in statuses, result


def test_threads_of_blas_are_within_the_limit(abuse: Abuse) -> None:
    """A BLAS that starts a thread for each CPU would break fork and exceed the process limit."""
    result = abuse(
        """
        import os
        os.environ['OPENBLAS_NUM_THREADS'] = '64'
        import numpy as np
        np.linalg.inv(np.eye(500)) @ np.ones((500, 500))
        print(len(os.listdir('/proc/self/task')) <= 4)
        """,
        max_processes=4,
    )
    assert result.stdout == "True\n"
