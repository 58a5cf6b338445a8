"""/proc and what it tells or takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status

if TYPE_CHECKING:
    from .harness import Abuse


def test_only_processes_and_only_ones_own(abuse: Abuse) -> None:
    """No sys, sysrq-trigger, kcore, keys, meminfo, bus, irq: nothing but processes."""
    result = abuse("""
        import os
        names = set(os.listdir('/proc')) - {'1', 'self', 'thread-self'}
        print(sorted(names), [n for n in ('sys', 'sysrq-trigger', 'kcore', 'kmsg', 'keys',
              'meminfo', 'loadavg', 'stat', 'cmdline', 'version', 'config.gz', 'kallsyms', 'bus',
              'timer_list', 'sched_debug', 'scsi', 'acpi', 'asound', 'fs', 'irq', 'latency_stats')
              if os.path.exists('/proc/' + n)])
    """)
    assert result.stdout == "['2'] []\n"


def test_neighbour_is_invisible(neighbours: NativeSandbox) -> None:
    """Two snippets at the same time: neither sees the other's processes or files."""
    code = """
import os, time
open('/tmp/{0}', 'w').close(); open('/dev/shm/{0}', 'w').close()
if os.fork() == 0: time.sleep(600)
time.sleep(0.3)
print(sorted(set(os.listdir('/proc')) - {{'1', 'self', 'thread-self'}}),
      [n for n in os.listdir('/tmp') if len(n) == 1], os.listdir('/dev/shm'))
"""
    first, second = neighbours.execute_batch([code.format("a"), code.format("b")])
    assert first.stdout == "['2', '3'] ['a'] ['a']\n"
    assert second.stdout == "['2', '3'] ['b'] ['b']\n"


@pytest.mark.parametrize("value", ["0", "-1000", "999"])
def test_oom_score_cannot_be_lowered(abuse: Abuse, value: str) -> None:
    """Who sets itself a low score makes the kernel kill the trainer instead."""
    result = abuse(
        f"""
        def score(): return int(open('/proc/self/oom_score_adj').read())
        def write(text):
            with open('/proc/self/oom_score_adj', 'w') as file: file.write(text)
        before = score()
        print(outcome(write, {value!r}) is not None, score() == before)
        """,
        raw=True,
    )
    assert result.stdout == "True True\n"


def test_writing_ones_own_code(abuse: Abuse) -> None:
    """/proc/self/mem writes where the page is read-only; the file behind it must stay the same."""
    result = abuse(
        """
        line = next(l for l in open('/proc/self/maps') if 'libc' in l and ' r-xp ' in l)
        start, path = int(line.split('-')[0], 16), line.split()[-1]
        offset = int(line.split()[2], 16)
        before = os.pread(os.open(path, os.O_RDONLY), 16, offset)
        mem = outcome(os.open, '/proc/self/mem', os.O_RDWR)
        if isinstance(mem, int):
            outcome(os.pwrite, mem, bytes(16), start)
        print(os.pread(os.open(path, os.O_RDONLY), 16, offset) == before)
        """,
        raw=True,
    )
    assert result.stdout == "True\n"


def test_physical_addresses(abuse: Abuse) -> None:
    """pagemap without frame numbers (Rowhammer: Seaborn and Dullien, 2015)."""
    result = abuse("""
        import os
        try:
            fd = os.open('/proc/self/pagemap', os.O_RDONLY)
            here = id(fd) // 4096 * 8
            print(int.from_bytes(os.pread(fd, 8, here), 'little') & (1 << 55) - 1)
        except OSError:
            print(0)
    """)
    assert result.stdout == "0\n"


def test_kernel_addresses(abuse: Abuse) -> None:
    """Stacks, wait channels and socket tables print none (KASLR)."""
    result = abuse("""
        import re, socket
        kept = socket.socketpair()
        text = ''
        for name in ('stack', 'wchan', 'syscall', 'stat', 'net/unix', 'timers', 'limits'):
            try: text += open('/proc/self/' + name).read()
            except OSError: pass
        print(re.findall('f{4}[89a-f][0-9a-f]{11}', text))
    """)
    assert result.stdout == "[]\n"


def test_names_of_the_host(abuse: Abuse) -> None:
    """Paths of control groups tell nothing about who runs us."""
    result = abuse("""
        cgroups = {line.rstrip('\\n').split(':', 2)[2] for line in open('/proc/self/cgroup')}
        print(cgroups)
    """)
    assert result.stdout == "{'/'}\n"


@pytest.mark.parametrize("name", ["mountinfo", "environ", "cmdline", "maps"])
def test_paths_of_the_owner(abuse: Abuse, name: str) -> None:
    """What the calling process works on is named nowhere."""
    result = abuse(f"print(open('/proc/self/{name}').read())")
    assert result.status is Status.OK
    assert str(Path(__file__).parent) not in result.stdout


def test_sockets_of_the_last_snippet(abuse: Abuse) -> None:
    """The network namespace's tables are empty again for the next one."""
    abuse("""
        import os, socket
        for i in range(20):
            s = socket.socket(socket.AF_UNIX)
            s.bind(f'\\0left-over-{i}')
            s.listen(); os.dup(s.detach())
        if os.fork() == 0:
            os.setsid(); __import__('time').sleep(600)
    """)
    result = abuse("""
        try: lines = open('/proc/self/net/unix').read().splitlines()[1:]
        except OSError: lines = []
        print(lines)
    """)
    assert result.stdout == "[]\n"


def test_memory_of_a_neighbour_by_pid(neighbours: NativeSandbox) -> None:
    """Every pid up to a few thousand, by /proc, kill and ptrace: nobody there."""
    probe = """
import errno, os
found = []
for pid in list(range(3, 5000)):
    try:
        os.kill(pid, 0)
        found.append(pid)
    except ProcessLookupError: pass
    except PermissionError: found.append(pid)
print(found)
"""
    sleeper = ExecutionRequest("import time; time.sleep(0.4)")
    _, result = neighbours.execute_batch([sleeper, probe])
    assert (result.status, result.stdout) == (Status.OK, "[]\n")
