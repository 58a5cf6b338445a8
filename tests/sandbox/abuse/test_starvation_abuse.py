"""What one snippet takes from another that runs at the same time."""

from __future__ import annotations

import os
import threading
import time

import pytest

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status

from .harness import MIB, RAW, snippet_processes

VICTIM = """
import os, signal, socket, threading, time
time.sleep(0.25)  # into the middle of the attack
x = bytearray(b'1') * (64 << 20)
files = [open(f'f{i}', 'w') for i in range(100)]
files[0].write('x' * (8 << 20))
pipes = [os.pipe() for _ in range(20)]
room = []
for _, w in pipes[:4]:
    os.set_blocking(w, False)
    room.append(os.write(w, bytes(1 << 16)))
a, b = socket.socketpair()
socket.send_fds(a, [b'x'], [0] * 8)
signal.setitimer(signal.ITIMER_REAL, 60)
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
pids = [os.fork() for _ in range(1)]
if pids[0] == 0: os._exit(0)
os.waitpid(pids[0], 0)
print('unharmed', room)
"""


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param("while True:\n    try: os.fork()\n    except OSError: pass", id="processes"),
        pytest.param(
            "import threading\nwhile True:\n"
            "    try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
            "    except RuntimeError: pass",
            id="threads",
        ),
        pytest.param(
            "x = []\nwhile True:\n    try: x.append(bytearray(b'1') * (1 << 20))\n"
            "    except MemoryError: pass",
            id="memory",
        ),
        pytest.param(
            "f = open('f', 'wb', 0)\nwhile True: outcome(f.write, bytes(1 << 20))", id="disk"
        ),
        pytest.param(
            "i = 0\nwhile True:\n    i += 1; f = outcome(os.open, f'f{i}', os.O_CREAT)\n"
            "    if isinstance(f, int): os.close(f)",
            id="inodes",
        ),
        pytest.param(
            "while True: outcome(os.write, 1, b'x' * 4096); time.sleep(1e-4)", id="output"
        ),
        pytest.param(
            "kept = []\nwhile True:\n    p = outcome(os.pipe)\n"
            "    if isinstance(p, tuple):\n        kept.append(p); os.set_blocking(p[1], False)\n"
            "        while outcome(os.write, p[1], bytes(4096)) != 'EAGAIN': pass",
            id="pipe-pages-of-the-user",
        ),
        pytest.param(
            "kept = []\nwhile True:\n    try:\n        s = socket.socketpair(); kept.append(s)\n"
            "        socket.send_fds(s[0], [b'x'], [0] * 200)\n    except OSError: pass",
            id="descriptors-in-flight-of-the-user",
        ),
        pytest.param(
            "signal.pthread_sigmask(signal.SIG_BLOCK, {40})\n"
            "info = (ctypes.c_int * 32)(40, 0, -1)\n"
            "while True: raw(129, os.getpid(), 40, info)",
            id="pending-signals-of-the-user",
        ),
        pytest.param("while True: raw(222, 1, 0, ctypes.byref(ctypes.c_int()))", id="timers"),
        pytest.param(
            "kept = []\nwhile True:\n    for i in range(200):\n"
            "        e = outcome(__import__('select').epoll)\n"
            "        if not isinstance(e, str): kept.append(e)",
            id="epoll-instances",
        ),
    ],
)
def test_neighbour_is_unharmed(neighbours: NativeSandbox, attack: str) -> None:
    """Limits that the kernel counts per user must not be shared by two snippets."""
    if "raw(" in attack and os.uname().machine != "x86_64":
        pytest.skip("its system call numbers are those of x86_64")
    attacker = ExecutionRequest(RAW + attack, timeout_s=0.6, max_output_bytes=16 * MIB)
    victim = ExecutionRequest(VICTIM, timeout_s=10)
    first, second = neighbours.execute_batch([attacker, victim])
    assert first.status in (Status.TIMEOUT, Status.MEMORY, Status.ERROR, Status.OUTPUT)
    assert (second.status, second.stdout) == (Status.OK, "unharmed [65536, 65536, 65536, 65536]\n")


def test_page_cache_of_the_last_snippet_is_not_charged_to_the_next(box: NativeSandbox) -> None:
    """Files read by one snippet stay cached, in the account of the jail it ran in."""
    read = """
import os
total = 0
for directory, _, names in os.walk('/usr/lib'):
    for name in names:
        try:
            with open(os.path.join(directory, name), 'rb') as file: total += len(file.read())
        except OSError: pass
        if total > 150 << 20: raise SystemExit
"""
    box.execute(ExecutionRequest(read, memory_bytes=256 * MIB))
    after = box.execute(
        ExecutionRequest("x = bytearray(b'1') * (200 << 20); print(len(x))", memory_bytes=256 * MIB)
    )
    assert (after.status, after.stdout) == (Status.OK, f"{200 << 20}\n"), after


def test_queue_keeps_moving(neighbours: NativeSandbox) -> None:
    """Sixteen bombs in the queue: the honest ones between them all get their turn."""
    bomb = ExecutionRequest(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout_s=0.1
    )
    results = neighbours.execute_batch([bomb, "print('honest')"] * 8)
    assert [r.status for r in results[::2]] == [Status.TIMEOUT] * 8
    assert [r.stdout for r in results[1::2]] == ["honest\n"] * 8


def test_survivors_would_be_seen(box: NativeSandbox) -> None:
    """The look for left-over processes, made after every case, finds those that do run."""
    sleeper = ExecutionRequest("import os, time\nos.fork()\ntime.sleep(0.6)")
    thread = threading.Thread(target=box.execute, args=(sleeper,))
    thread.start()
    seen = 0
    deadline = time.monotonic() + 5
    while seen < 2 and time.monotonic() < deadline:
        seen = len(snippet_processes(os.getpid()))
    thread.join()
    assert seen == 2
