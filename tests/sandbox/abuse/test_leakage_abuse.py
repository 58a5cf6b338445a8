"""What one snippet leaves for the next, or finds of the parent: secrets, state, hidden bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import NativeSandbox, Status

from .harness import RAW

if TYPE_CHECKING:
    from .harness import Abuse

# Looks for text in all writable memory of its process. The pattern must not contain the text.
SCAN = """
import re
def found(pattern):
    pattern, hits = re.compile(pattern), []
    for line in open('/proc/self/maps'):
        span, mode, *_ = line.split()
        if mode.startswith('rw'):
            start, end = (int(x, 16) for x in span.split('-'))
            if pattern.search(ctypes.string_at(start, end - start)): hits.append(line)
    return hits
"""


def test_scan_finds_what_is_there(abuse: Abuse) -> None:
    """The scan used below works: it finds text of its own snippet."""
    result = abuse(
        SCAN + "kept = b'needle' * 3\nprint(len(found(rb'(needl[e]){3}')) > 0)", raw=True
    )
    assert result.stdout == "True\n"


def test_secrets_of_the_parent_are_not_in_memory(abuse: Abuse, secret: str) -> None:
    """Environment and heap of the calling process (a fork server shares both; sandlock)."""
    assert secret.startswith("hunter2-correct-horse")
    result = abuse(
        SCAN
        + """
print(found(rb'hunter[2]-correct-horse'), 'THOR_ABUSE_SECRET' in os.environ,
      b'ABUSE_SECRET' in open('/proc/self/environ', 'rb').read())
""",
        raw=True,
    )
    assert result.stdout == "[] False False\n"


def test_secrets_of_the_parent_are_not_among_objects(abuse: Abuse) -> None:
    """Every object the collector knows, every frame up to the bottom, every module."""
    result = abuse("""
        import gc, sys
        gc.unfreeze()
        kinds = (dict, list, tuple)
        texts = [repr(o) for o in gc.get_objects() if type(o) in kinds and len(o) < 5000]
        frame = sys._getframe()
        while frame:
            texts.append(repr(frame.f_locals))
            frame = frame.f_back
        needle = 'hunter' + str(2)
        print(len(texts) > 1000, [t[:80] for t in texts if needle in t and 'needle' not in t])
    """)
    assert result.stdout == "True []\n"


def test_last_snippet_is_not_in_memory(abuse: Abuse) -> None:
    """Source, input, files, environment and output of one snippet, looked for by the next."""
    first = abuse(
        "quokka = 'quokka-in-source'\nimport sys\nsys.stdin.read()\nprint('quokka-in-output')",
        stdin="quokka-in-stdin",
        files={"quokka-in-name": b"quokka-in-file"},
        env={"QUOKKA": "quokka-in-environment"},
    )
    assert first.stdout == "quokka-in-output\n"
    result = abuse(SCAN + "print(found(rb'quokk[a]'))", raw=True)
    assert result.stdout == "[]\n"


def test_marks_on_shared_pages(abuse: Abuse) -> None:
    """Writable shared mappings inherited from the zygote would be a common notebook."""
    abuse(
        """
        for line in open('/proc/self/maps'):
            span, mode, *_ = line.split()
            if mode.startswith('rw') and mode.endswith('s'):
                start, end = (int(x, 16) for x in span.split('-'))
                ctypes.memmove(start + end - start - 16, b'wombat-was-here', 15)
        """,
        raw=True,
    )
    assert abuse(SCAN + "print(found(rb'womba[t]-was'))", raw=True).stdout == "[]\n"


FINGERPRINT = """
import decimal, fcntl, gc, locale, resource, warnings
def mask(): old = os.umask(0); os.umask(old); return old
status = dict(l.rstrip().split(':', 1) for l in open('/proc/self/status'))
print(os.getcwd(), mask(), os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)))
print(os.sched_getscheduler(0), os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0))
print([resource.getrlimit(i) for i in range(16)], resource.getrusage(resource.RUSAGE_CHILDREN)[:3])
print([status.get(k) for k in ('Name', 'Threads', 'SigQ', 'SigPnd', 'ShdPnd', 'SigBlk', 'SigIgn',
      'SigCgt', 'NoNewPrivs', 'Seccomp', 'Seccomp_filters', 'THP_enabled', 'Groups')])
print([signal.getitimer(i) for i in range(3)], [signal.getsignal(s) for s in (1, 2, 14, 15, 17)])
print([open(f'/proc/self/{n}').read() for n in ('oom_score_adj', 'coredump_filter', 'timerslack_ns',
      'personality', 'comm') if os.access(f'/proc/self/{n}', os.R_OK)])
print([(fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD)) for fd in range(3)])
print([outcome(fcntl.fcntl, fd, fcntl.F_GETPIPE_SZ) for fd in range(3)])
print(sorted(os.environ.items()), sys.path, sys.argv, sys.flags)
print(sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold())
print(locale.setlocale(locale.LC_ALL), decimal.getcontext().prec, warnings.filters)
for directory in ('.', '/tmp', '/dev/shm', '/'):
    s, f = os.stat(directory), os.statvfs(directory)
    print(s.st_mode, s.st_uid, s.st_gid, s.st_nlink, f.f_bfree, f.f_ffree)
    print(sorted(os.listdir(directory)))
print(os.sysconf('SC_OPEN_MAX'), os.uname(), sorted(sys.modules))
"""

POLLUTION = """
import decimal, fcntl, gc, resource, threading, random, socket
os.umask(0o777); os.chdir('/'); os.nice(5); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
outcome(os.setsid); outcome(os.setpgid, 0, 0)
for i in range(16):
    try: resource.setrlimit(i, (resource.getrlimit(i)[0] // 2 if i not in (0, 2, 3, 7, 9) else
                                resource.getrlimit(i)[0], resource.getrlimit(i)[1]))
    except (ValueError, OSError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, {1, 2, 14}); os.kill(os.getpid(), 14)
signal.signal(17, signal.SIG_IGN); signal.setitimer(signal.ITIMER_VIRTUAL, 100)
for name, value in (('oom_score_adj', '1000'), ('coredump_filter', '0xff'), ('comm', 'polluted'),
                    ('timerslack_ns', '1000000'), ('autogroup', '5')):
    try: open('/proc/self/' + name, 'w').write(value)
    except OSError: pass
raw(157, 15, b'polluted', 0, 0, 0)
for fd in range(3):
    outcome(fcntl.fcntl, fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
    outcome(fcntl.fcntl, fd, fcntl.F_SETPIPE_SZ, 4096)
os.environ.clear(); sys.path.clear(); sys.modules['leak'] = sys; sys.setrecursionlimit(99999)
sys.setswitchinterval(1); gc.disable(); gc.set_threshold(1); decimal.getcontext().prec = 3
for path in ('/tmp', '/dev/shm', '/tmp/work'):
    with open(path + '/left', 'w') as file: file.write('x' * 10000)
    outcome(os.setxattr, path, 'user.left', b'1')
    os.utime(path, (1, 1)); os.chmod(path, 0o711)
print('polluted')
sys.stdout.flush()
os._exit(0)
"""


def test_process_attributes(abuse: Abuse) -> None:
    """All that fork inherits, before and after a snippet that changed everything it could."""
    before = abuse(FINGERPRINT, raw=True)
    assert before.status is Status.OK, before.stderr
    assert abuse(POLLUTION, raw=True).stdout == "polluted\n"
    after = abuse(FINGERPRINT, raw=True)
    assert after.stdout.splitlines() == before.stdout.splitlines()


STAMPS = """
def stamps():
    found = map(os.stat, ('/tmp', '/dev/shm', '/tmp/work'))
    return {t for s in found for t in (s.st_mtime_ns, s.st_ctime_ns, s.st_atime_ns)}
"""


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(
            "open(path + '/x', 'w').close(); os.unlink(path + '/x')", id="file-made-and-removed"
        ),
        pytest.param(
            "os.chmod(path, 0o711); os.chmod(path, 0o700)", id="mode-changed-and-restored"
        ),
        pytest.param("os.utime(path, ns=(10**9, 10**9))", id="times-set"),
        pytest.param("os.listdir(path)", id="directory-read-atime"),
        pytest.param("outcome(os.setxattr, path, 'user.x', b'1')", id="attribute-set"),
        pytest.param(
            "outcome(os.chown, path, os.getuid(), os.getgid())", id="owner-set-to-the-same"
        ),
    ],
)
def test_traces_on_directories(abuse: Abuse, trace: str) -> None:
    """A jail counts as untouched by counts and times; each of these changes another of them."""
    # Sleeps longer than a tick of the kernel's coarse clock, so that no two events share a time.
    first = abuse(
        f"{STAMPS}\nbefore = stamps()\ntime.sleep(0.02)\n"
        f"for path in ('/tmp', '/dev/shm', '/tmp/work'): {trace}\n"
        "print(*(stamps() - before))\ntime.sleep(0.02)",
        raw=True,
    )
    second = abuse(f"{STAMPS}\nprint(*stamps())", raw=True)
    assert first.status is second.status is Status.OK
    assert not set(first.stdout.split()) & set(second.stdout.split())


def test_inode_numbers_count_files(abuse: Abuse) -> None:
    """O_TMPFILE leaves no name, count or time behind, but the next inode number is higher."""
    number = """
        for path in ('/tmp', '/dev/shm'):
            fd = os.open(path + '/probe', os.O_CREAT | os.O_RDWR)
            print(os.fstat(fd).st_ino)
    """
    before = abuse(number, raw=True).stdout
    abuse(
        """
        for path in ('/tmp', '/dev/shm'):
            for _ in range(100):
                fd = outcome(os.open, path, os.O_TMPFILE | os.O_RDWR, 0o600)
                if isinstance(fd, int): os.close(fd)
        """,
        raw=True,
    )
    assert abuse(number, raw=True).stdout == before


def test_cookies_of_sockets_count_sockets(abuse: Abuse) -> None:
    """SO_COOKIE comes from one counter for the whole machine: n taken here are n missing there."""
    probe = """
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for _ in range(%d):
            cookie = outcome(socket.socketpair()[0].getsockopt, socket.SOL_SOCKET, 57, 8)
        print(int.from_bytes(cookie, 'little') if isinstance(cookie, bytes) else cookie)
    """
    first, second = abuse(probe % 1, raw=True).stdout, abuse(probe % 77, raw=True).stdout
    assert first == second, "refused with the same error, or a constant"


def test_page_cache_read_without_waiting(abuse: Abuse) -> None:
    """Files evicted or read by one snippet; RWF_NOWAIT tells the next which: bits get across."""
    files = """
        import glob
        names = map(os.path.realpath, glob.glob('/usr/share/doc/*/copyright'))
        files = sorted({n for n in names if os.path.isfile(n)})[:16]
    """
    write = abuse(
        files
        + """
        for bit, name in zip('1011001110001011', files):
            fd = os.open(name, os.O_RDONLY)
            outcome(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if bit == '1': os.read(fd, 10)
            os.close(fd)
        print(len(files))
        """,
        raw=True,
    )
    if write.stdout != "16\n":
        pytest.skip(f"needs 16 documents below /usr/share, got {write.stdout.strip()}")
    read = abuse(
        files
        + """
        for name in files:
            got = outcome(os.preadv, os.open(name, os.O_RDONLY), [bytearray(8)], 0, os.RWF_NOWAIT)
            print('1' if got == 8 else '0' if got == 'EAGAIN' else '?', end='')
        """,
        raw=True,
    )
    assert set(read.stdout) == {"?"}


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param("import random; print(random.random())", id="random"),
        pytest.param("import random; print(random.SystemRandom().random())", id="SystemRandom"),
        pytest.param("import numpy as np; print(np.random.rand())", id="numpy-legacy"),
        pytest.param(
            "import numpy as np; print(np.random.default_rng().random())", id="numpy-generator"
        ),
        pytest.param("import uuid; print(uuid.uuid1().int, uuid.uuid4())", id="uuid"),
        pytest.param("import secrets; print(secrets.token_hex())", id="secrets"),
        pytest.param("import ssl; print(ssl.RAND_bytes(8))", id="OpenSSL"),
        pytest.param("import tempfile; print(tempfile.mktemp())", id="tempfile"),
        pytest.param(
            "import os\nif os.fork(): os.wait(); raise SystemExit\n"
            "import random; print(random.random())",
            id="random-in-a-child",
        ),
        pytest.param(
            "import email.utils; print(email.utils.make_msgid(domain='x'))", id="message-id"
        ),
    ],
)
def test_random_numbers_differ(abuse: Abuse, draw: str) -> None:
    """Forks of one zygote draw the same numbers unless each is seeded anew."""
    outputs = [abuse(draw).stdout for _ in range(4)]
    assert "" not in outputs
    assert len(set(outputs)) == 4


def test_modules_replaced_on_disk(abuse: Abuse) -> None:
    """A random.py in the working directory shadows the real one; here, and nowhere else."""
    abuse("""
        import os
        for path in ('random.py', '/tmp/random.py', '/dev/shm/random.py', 'sitecustomize.py'):
            with open(path, 'w') as file: file.write('leak = 1')
        os.makedirs('/tmp/work/numpy', exist_ok=True)
        open('/tmp/work/numpy/__init__.py', 'w').write('leak = 1')
    """)
    after = abuse("import random, numpy; print(hasattr(random, 'leak'), hasattr(numpy, 'leak'))")
    assert after.stdout == "False False\n"


def test_objects_of_the_standard_library(abuse: Abuse) -> None:
    """Caches, registries and interned objects of shared modules."""
    abuse("""
        import codecs, copyreg, functools, json, math, re, sys
        re.compile('leaked-pattern'); sys.intern('leaked-name'); json.leak = math.leak = 1
        codecs.register(lambda name: codecs.lookup('utf-8') if name == 'leak' else None)
        copyreg.pickle(complex, lambda c: (leak, ())); re.compile = None; json.loads = None
        sys.set_int_max_str_digits(0)
    """)
    after = abuse("""
        import codecs, copyreg, json, math, re, sys
        try: codecs.lookup('leak'); print('leak')
        except LookupError: pass
        print(json.loads('[1]'), re.compile('x').pattern, hasattr(math, 'leak'),
              copyreg.dispatch_table.get(complex).__name__, sys.get_int_max_str_digits())
    """)
    assert after.stdout == "[1] x False pickle_complex 4300\n"


def test_neighbour_is_not_in_memory(neighbours: NativeSandbox) -> None:
    """Two at a time: neither holds the other's source, wherever it came by."""
    hold = "numbat = 'numbat-' + 'secret'\nimport time\ntime.sleep(0.5)"
    look = RAW + SCAN + "time.sleep(0.1)\nprint(found(rb'numba[t]-'))"
    _, result = neighbours.execute_batch([hold, look])
    assert result.stdout == "[]\n"
