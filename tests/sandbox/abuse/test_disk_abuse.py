"""Files: more than there is room for, where they must not be, and names that bite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize("directory", [".", "/tmp", "/dev/shm"])
def test_room_is_bounded(abuse: Abuse, directory: str) -> None:
    """Bytes until ENOSPC: at most 64 MiB in each tmpfs."""
    result = abuse(
        f"""
        written = 0
        with open({directory!r} + '/f', 'wb', 0) as file:
            try:
                while True: written += file.write(bytes(1 << 20))
            except OSError as error:
                print(errno.errorcode[error.errno], written >> 20 <= 64)
        """,
        raw=True,
    )
    assert result.stdout in ("ENOSPC True\n", "EFBIG True\n")


def test_deleted_files_still_take_room(abuse: Abuse) -> None:
    """Unlinked but open: invisible to who adds up directory listings."""
    result = abuse(
        """
        kept = []
        try:
            while True:
                kept.append(open('f', 'wb', 0))
                os.unlink('f')
                kept[-1].write(bytes(1 << 20))
        except OSError as error:
            print(errno.errorcode[error.errno], len(kept) <= 65)
        """,
        raw=True,
    )
    assert result.stdout == "ENOSPC True\n"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param("open(f'f{i}', 'w').close()", id="files"),
        pytest.param("os.symlink('x' * 200, f'l{i}')", id="symbolic-links"),
        pytest.param(
            "os.link(__file__, f'h{i}') if i else open(__file__, 'w').close()", id="hard-links"
        ),
        pytest.param("os.mkfifo(f'p{i}')", id="fifos"),
        pytest.param("os.mkdir('d'); os.chdir('d')", id="directories-ever-deeper"),
        pytest.param("open(f'{i:0255}', 'w').close()", id="names-of-255-characters"),
        pytest.param(
            "s = socket.socket(socket.AF_UNIX); s.bind(f's{i}'); s.close()", id="bound-sockets"
        ),
    ],
)
def test_number_of_files_is_bounded(abuse: Abuse, make: str) -> None:
    """Files of no bytes are not free; depth included (CVE-2021-33909; snekbox: 1000 levels)."""
    result = abuse(
        f"""
        try:
            for i in range(20_000):
                {make}
        except OSError as error:
            print(errno.errorcode[error.errno])
        """,
        raw=True,
    )
    assert (result.status, result.stdout) == (Status.OK, "ENOSPC\n")


def test_sparse_file_of_a_pebibyte(abuse: Abuse) -> None:
    """No blocks, yet whoever copies or maps it is in trouble (snekbox)."""
    result = abuse(
        """
        with open('sparse', 'wb') as file:
            print(outcome(os.ftruncate, file.fileno(), 1 << 50),
                  outcome(os.posix_fallocate, file.fileno(), 0, 1 << 40))
        """,
        raw=True,
    )
    assert result.stdout == "EFBIG EFBIG\n"


def test_names_that_bite(abuse: Abuse) -> None:
    """Bytes that are no UTF-8, newlines, escapes, options: for who lists or cleans up by name."""
    result = abuse(
        r"""
        import os
        for name in (b'\xff\xfe', b'a\nb', b'-rf', b'\x1b[2J', b'$(reboot)', b'..\xc0\xaf',
                     b' ', b'~'):
            open(name, 'w').close()
        print(len(os.listdir(b'.')))
        """
    )
    assert result.stdout == "8\n"


def test_working_directory_becomes_a_link(abuse: Abuse) -> None:
    """Who later writes files by that path writes elsewhere (CVE-2024-28185, judge0)."""
    result = abuse("""
        import os
        here = os.getcwd()
        os.chdir('/tmp')
        os.rename(here, '/tmp/moved')
        os.symlink('/dev/shm', here)
        print(os.path.realpath(here))
    """)
    assert result.stdout == "/dev/shm\n"
    after = abuse(
        "import os\nprint(open('in.txt').read(), os.listdir('/dev/shm'), os.path.islink('.'))",
        files={"in.txt": b"given"},
    )
    assert after.stdout == "given [] False\n"


def test_directories_nobody_may_enter(abuse: Abuse) -> None:
    """Mode 0 on everything private: the next snippet must not depend on it."""
    result = abuse("""
        import os
        here = os.getcwd()
        for path in ('/dev/shm', here, '/tmp'):
            os.chmod(path, 0)
        print(os.access(here, os.R_OK))
    """)
    assert result.stdout == "False\n"
    after = abuse("print(open('in.txt').read())", files={"in.txt": b"given"})
    assert after.stdout == "given\n"


def test_working_directory_removed(abuse: Abuse) -> None:
    """A current directory that does not exist (CVE-2018-1000001 was one kind)."""
    result = abuse("import os\nos.rmdir(os.getcwd())\nos.getcwd()")
    assert (result.status, "FileNotFoundError" in result.stderr) == (Status.ERROR, True)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("open(os.__file__, 'a')", id="append-to-the-standard-library"),
        pytest.param("os.chmod(os.__file__, 0o777)", id="chmod"),
        pytest.param("os.utime(os.__file__)", id="utime"),
        pytest.param("os.unlink(os.__file__)", id="unlink"),
        pytest.param("os.rename(os.__file__, os.__file__ + 'x')", id="rename"),
        pytest.param("os.mkdir(os.path.dirname(os.__file__) + '/numpy_')", id="package-to-shadow"),
        pytest.param(
            "open(importlib.util.cache_from_source(os.__file__), 'wb')", id="poisoned-pyc"
        ),
        pytest.param("os.truncate('/bin/sh', 0)", id="truncate-the-shell"),
        pytest.param("os.symlink('/tmp', '/usr/local/x')", id="link-below-usr"),
        pytest.param("os.mkdir('/new')", id="new-directory-in-the-root"),
        pytest.param("os.rename('/tmp', '/tmp2')", id="rename-a-mount-point"),
        pytest.param("os.unlink('/dev/null')", id="unlink-dev-null"),
        pytest.param("os.chmod('/dev/null', 0)", id="chmod-dev-null"),
        pytest.param("os.mknod('/dev/shm/sda', 0o60600, os.makedev(254, 0))", id="block-device"),
        pytest.param("os.mknod('mem', 0o20600, os.makedev(1, 1))", id="character-device"),
        pytest.param("os.link('/bin/sh', 'sh')", id="hard-link-to-read-only-file"),
        pytest.param("os.chown('.', 0, 0)", id="chown-to-root"),
    ],
)
def test_what_snippets_share_cannot_be_changed(abuse: Abuse, call: str) -> None:
    """All that a later snippet will read, run or open."""
    result = abuse(f"import importlib.util\nprint(outcome(lambda: {call}))", raw=True)
    assert result.stdout.strip() in {
        "EROFS",
        "EPERM",
        "EACCES",
        "EXDEV",
        "EINVAL",
        "EBUSY",
        "ENOENT",
    }


def test_dirty_pipe(abuse: Abuse) -> None:
    """CVE-2022-0847: a page of a read-only file spliced into a pipe, then written."""
    result = abuse(
        """
        path = os.__file__
        before = open(path, 'rb').read(64)
        fd = os.open(path, os.O_RDONLY)
        r, w = os.pipe()
        os.write(w, bytes(65536)); os.read(r, 65536)  # leaves can-merge flags on every buffer
        os.splice(fd, w, 1, offset_src=0)
        os.write(w, b'OWNED')
        print(open(path, 'rb').read(64) == before)
        """,
        raw=True,
    )
    assert result.stdout == "True\n"


def test_dirty_cow(abuse: Abuse) -> None:
    """CVE-2016-5195: madvise races a write through /proc/self/mem to a private read-only page."""
    result = abuse(
        """
        import mmap, threading
        path = os.__file__
        before = open(path, 'rb').read(64)
        pages = mmap.mmap(os.open(path, os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
        stop = time.monotonic() + 0.2
        def drop():
            while time.monotonic() < stop: pages.madvise(mmap.MADV_DONTNEED)
        thread = threading.Thread(target=drop); thread.start()
        line = next(l for l in open('/proc/self/maps') if l.rstrip().endswith(path))
        address = int(line.split('-')[0], 16)
        mem = outcome(os.open, '/proc/self/mem', os.O_RDWR)
        while time.monotonic() < stop:
            if isinstance(mem, int): outcome(os.pwrite, mem, b'OWNED', address)
        thread.join()
        print(open(path, 'rb').read(64) == before)
        """,
        raw=True,
    )
    assert result.stdout == "True\n"


def test_file_handles(abuse: Abuse) -> None:
    """Shocker (Docker, 2014): open_by_handle_at reaches any inode of a file system."""
    result = abuse(
        """
        handle = (ctypes.c_uint * 34)(128)
        print(raw(303, -100, b'/usr', handle, ctypes.byref(ctypes.c_int()), 0),
              raw(304, -100, handle, 0))
        """,
        raw=True,
    )
    assert result.stdout == "EPERM EPERM\n"


def test_core_dump(abuse: Abuse) -> None:
    """A crash writes no file, here or where the host's core_pattern says."""
    crash = abuse("""
        import os, resource
        try: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
        except ValueError: pass
        pid = os.fork()
        if pid == 0:
            os.abort()
        print(os.WCOREDUMP(os.waitpid(pid, 0)[1]), os.listdir('.'))
    """)
    assert crash.stdout == "False []\n"
