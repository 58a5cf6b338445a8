"""Memory by every door: heap, tree of processes, shared pages, tables, buffers in the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

from .harness import MIB, REFUSED

if TYPE_CHECKING:
    from .harness import Abuse


def test_ten_processes_of_250_megabytes(abuse: Abuse) -> None:
    """Each is below a limit per process; the tree is five times above it."""
    result = abuse(
        """
        import os, time
        for _ in range(9):
            if os.fork() == 0:
                break
        held = bytearray(250 << 20)
        for i in range(0, len(held), 4096):
            held[i] = 1
        time.sleep(600)
        """,
        timeout_s=8,
        memory_bytes=512 * MIB,
    )
    assert result.status is Status.MEMORY


def test_children_unshare_what_they_inherited(abuse: Abuse) -> None:
    """fork copies no page; writing does (copy on write, sandlock's clones)."""
    result = abuse(
        """
        import os, time
        held = bytearray(b'1') * (100 << 20)
        for _ in range(5):
            if os.fork() == 0:
                break
        for i in range(0, len(held), 4096):
            held[i] = 2
        time.sleep(600)
        """,
        timeout_s=6,
        memory_bytes=256 * MIB,
    )
    assert result.status is Status.MEMORY


def test_memory_bomb_that_execs(abuse: Abuse) -> None:
    """A new program starts with a fresh heap; its limits are the old ones."""
    result = abuse(
        """
        import os, sys
        code = 'x = [bytearray(1 << 20) for _ in range(400)]; print(len(x))'
        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', code])
        """,
        memory_bytes=128 * MIB,
    )
    assert result.status in (Status.ERROR, Status.MEMORY)
    assert result.stdout == ""


def test_list_that_grows(abuse: Abuse) -> None:
    """Small steps, so that no single allocation is suspicious."""
    result = abuse("x = []\nwhile True: x.append(' ' * 50_000)", memory_bytes=64 * MIB)
    assert (result.status, "MemoryError" in result.stderr) == (Status.MEMORY, True)


def test_memory_error_swallowed_for_ever(abuse: Abuse) -> None:
    """Lives at the limit without ever dying of it; time ends it."""
    result = abuse(
        """
        x = []
        while True:
            try: x.append(bytearray(1 << 16))
            except MemoryError: pass
        """,
        memory_bytes=32 * MIB,
        timeout_s=0.6,
    )
    assert result.status in (Status.TIMEOUT, Status.MEMORY)


def test_decompression_bomb(abuse: Abuse) -> None:
    """A thousand bytes out for each one in (42.zip)."""
    result = abuse(
        """
        import zlib
        layer = zlib.compress(bytes(10 << 20), 9) * 40
        inflate, out = zlib.decompressobj(), []
        while layer:
            out.append(inflate.decompress(layer))
            layer, inflate = inflate.unused_data, zlib.decompressobj()
        print(sum(map(len, out)))
        """,
        memory_bytes=128 * MIB,
    )
    assert (result.status, result.stdout) == (Status.MEMORY, "")


def test_shared_anonymous_memory(abuse: Abuse) -> None:
    """MAP_SHARED is no private data: RLIMIT_DATA does not count it."""
    result = abuse(
        """
        import mmap
        pages = mmap.mmap(-1, 400 << 20)
        for i in range(0, len(pages), 4096):
            pages[i] = 1
        print('touched')
        """,
        memory_bytes=128 * MIB,
    )
    assert (result.status, result.stdout) == (Status.MEMORY, "")


MMAP = """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
def mmap(size, flags, prot=3, address=None):
    ctypes.set_errno(0)
    result = libc.mmap(address, size, prot, flags, -1, 0)
    return errno.errorcode[ctypes.get_errno()] if result == 2 ** 64 - 1 else result
"""


@pytest.mark.parametrize(
    ("call", "errors"),
    [
        pytest.param("mmap(64 << 30, 0x4022)", {"ENOMEM"}, id="MAP_NORESERVE-64-GiB"),
        pytest.param("mmap(2 << 20, 0x40022)", {"ENOMEM", "EPERM"}, id="MAP_HUGETLB"),
        pytest.param(
            "mmap(1 << 30, 0x40022 | 30 << 26)", {"ENOMEM", "EPERM", "EINVAL"}, id="MAP_HUGE_1GB"
        ),
        pytest.param("mmap(1 << 20, 0x2022)", {"EPERM", "EAGAIN"}, id="MAP_LOCKED"),
        pytest.param("raw(149, mmap(4096, 0x22), 4096)", {"EPERM"}, id="mlock"),
        pytest.param("raw(325, mmap(4096, 0x22), 4096, 1)", {"EPERM"}, id="mlock2-on-fault"),
        pytest.param("raw(151, 1)", {"EPERM"}, id="mlockall"),
        pytest.param("raw(319, b'x', 0)", {"EPERM"}, id="memfd_create"),
        pytest.param("raw(319, b'x', 4)", {"EPERM"}, id="memfd_create-hugetlb"),
        pytest.param("raw(447, 0)", {"EPERM"}, id="memfd_secret"),
        pytest.param("raw(29, 1, 1 << 30, 0o1600)", {"EPERM"}, id="shmget"),
        pytest.param(
            "raw(206, 65536, ctypes.byref(ctypes.c_long()))", {"EPERM"}, id="io_setup-rings"
        ),
        pytest.param(
            "raw(28, mmap(4096, 0x22), 4096, 100)", {"EPERM", "EINVAL"}, id="MADV_HWPOISON"
        ),
        pytest.param("raw(237, mmap(4096, 0x22), 4096, 2, 0, 0, 0)", {"EPERM"}, id="mbind"),
    ],
)
def test_memory_no_limit_would_count(abuse: Abuse, call: str, errors: set[str]) -> None:
    """Each is a known way around RLIMIT_AS, RLIMIT_DATA or the accounting of pages."""
    result = abuse(f"{MMAP}\nprint({call})", raw=True)
    assert result.stdout.strip() in errors


def test_stack_that_grows_down(abuse: Abuse) -> None:
    """Stack Clash (CVE-2017-1000364): a mapping that grows by itself stops at a guard gap."""
    result = abuse(
        MMAP
        + """
top = mmap(1 << 16, 0x122)  # MAP_GROWSDOWN
print(isinstance(top, int), flush=True)
for offset in range(0, 1 << 30, 4096):
    ctypes.memset(top - offset, 1, 1)
print('grew by a gigabyte')
""",
        raw=True,
    )
    assert (result.status, result.signal, result.stdout) == (Status.ERROR, 11, "True\n")


def test_page_tables(abuse: Abuse) -> None:
    """A page in each gigabyte costs two pages of tables, which RSS and RLIMIT_DATA do not see."""
    result = abuse(
        MMAP
        + """
base, count = 1 << 40, 0
for i in range(40_000):
    address = mmap(4096, 0x100022, prot=1, address=base + (i << 30))  # MAP_FIXED_NOREPLACE
    if isinstance(address, str):
        break
    ctypes.string_at(address, 1)  # maps the zero page
    count += 1
tables = [int(line.split()[1]) for line in open('/proc/self/status') if line[:6] == 'VmPTE:']
print(tables[0] // 1024)
""",
        raw=True,
        memory_bytes=64 * MIB,
    )
    assert result.status in (Status.OK, Status.MEMORY)
    assert result.status is Status.MEMORY or int(result.stdout) <= 64


SOCKETS = """
import os, socket
held, kept = 0, []
def fill(wanted):
    global held
    try:
        while True:
            for s in socket.socketpair():
                kept.append(s)
                s.setblocking(False)
                if wanted:
                    try: s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
                    except OSError: pass
                try:
                    while held < 256 << 20: held += s.send(bytes(65536))
                    return
                except BlockingIOError: pass
    except OSError: pass
"""


def test_socket_buffers_enlarged(abuse: Abuse) -> None:
    """SO_SNDBUF up to wmem_max: kernel memory, up to gigabytes for 256 descriptors."""
    result = abuse(SOCKETS + "fill(1 << 30)\nprint(held >> 20)", memory_bytes=64 * MIB)
    assert result.status in (Status.OK, Status.MEMORY)
    assert result.status is Status.MEMORY or int(result.stdout) <= 64


def test_socket_buffers_of_a_tree(abuse: Abuse) -> None:
    """Buffers of ordinary size, times descriptors, times processes."""
    result = abuse(
        SOCKETS
        + """
reader, writer = os.pipe()
for _ in range(7):
    if os.fork() == 0:
        fill(0)
        os.write(writer, held.to_bytes(8, 'little'))
        os.read(reader, 0); import time; time.sleep(600)
total = sum(int.from_bytes(os.read(reader, 8), 'little') for _ in range(7))
print(total >> 20)
""",
        memory_bytes=128 * MIB,
    )
    assert result.status in (Status.OK, Status.MEMORY)
    assert result.status is Status.MEMORY or int(result.stdout) <= 128


def test_pipe_buffers(abuse: Abuse) -> None:
    """F_SETPIPE_SZ makes a megabyte of each pipe (CVE-2016-2847); refused, 8 MiB are left."""
    result = abuse(
        """
        import fcntl
        held, refused = 0, []
        try:
            while True:
                _, w = os.pipe()
                os.set_blocking(w, False)
                refused.append(outcome(fcntl.fcntl, w, fcntl.F_SETPIPE_SZ, 1 << 20))
                try:
                    while True: held += os.write(w, bytes(4096))
                except BlockingIOError: pass
        except OSError: pass
        print(held >> 20, *set(refused))
        """,
        raw=True,
    )
    held, *refused = result.stdout.split()
    assert int(held) <= 8
    assert set(refused) <= REFUSED


def test_descriptors_in_flight(abuse: Abuse) -> None:
    """Closed, but alive in an unread message: not counted by RLIMIT_NOFILE (CVE-2010-4249)."""
    result = abuse(
        """
        reader, writer = os.pipe()
        kept, count = [], 0
        try:
            while count < 5000:
                a, b = socket.socketpair()
                socket.send_fds(a, [b'x'], [reader] * 100)
                kept += [a, b]
                count += 100
        except OSError as error:
            print(errno.errorcode[error.errno], count <= 1000)
        """,
        raw=True,
    )
    assert result.stdout == "ETOOMANYREFS True\n"


def test_arguments_of_exec(abuse: Abuse) -> None:
    """Arguments of a new program are kernel memory until it runs (CVE-2010-3858)."""
    result = abuse("print(outcome(os.execv, '/bin/true', ['x' * 100_000] * 100))", raw=True)
    assert result.stdout == "E2BIG\n"


def test_shared_memory_and_tmpfs_with_heap(abuse: Abuse) -> None:
    """/dev/shm, /tmp and heap are one account, or each is bounded by itself."""
    result = abuse(
        """
        import os
        held = bytearray(b'1') * (60 << 20)
        written = 0
        for path in ('/dev/shm/a', '/tmp/b'):
            with open(path, 'wb', 0) as file:
                try:
                    while True: written += file.write(bytes(1 << 20))
                except OSError as error:
                    print(error.errno)
        print(written >> 20)
        """,
        memory_bytes=96 * MIB,
    )
    assert result.status in (Status.OK, Status.MEMORY)
    assert result.status is Status.MEMORY or int(result.stdout.split()[-1]) <= 128
