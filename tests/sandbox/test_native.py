"""The native sandbox: the contract, and what only it promises."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thor_fast.errors import SandboxError
from thor_fast.sandbox import ExecutionRequest, NativeSandbox, SandboxLimits, Status, Tier
from thor_fast.sandbox.base import Sandbox

from .contract import SandboxContract
from .leaks import is_guest, named, processes_of, roles

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shared() -> Iterator[NativeSandbox]:
    with NativeSandbox() as box:
        yield box


@pytest.fixture
def fresh() -> NativeSandbox:
    return NativeSandbox(slots=1)


@pytest.fixture
def sandbox(shared: NativeSandbox) -> NativeSandbox:
    return shared


class TestContract(SandboxContract):
    """The shared suite; its own ``sandbox`` fixture checks the next snippet too."""


def test_is_a_sandbox(sandbox: NativeSandbox) -> None:
    assert isinstance(sandbox, Sandbox)


# --- isolation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup", "time"])
def test_namespaces_are_not_the_hosts(sandbox: NativeSandbox, namespace: str) -> None:
    code = f"import os; print(os.readlink('/proc/self/ns/{namespace}'))"
    shown = sandbox.execute(code).stdout.strip()
    assert shown.startswith(f"{namespace}:[")
    assert shown != Path(f"/proc/self/ns/{namespace}").readlink().name


def test_concurrent_snippets_have_different_namespaces(sandbox: NativeSandbox) -> None:
    code = """
import os
print([os.readlink(f'/proc/self/ns/{n}') for n in ('user', 'pid', 'net', 'mnt', 'ipc', 'uts')])
"""
    with sandbox.session() as one:
        first = one.execute(code)
        second = sandbox.execute(code)  # while the session's process lives
    names = zip(eval(first.stdout), eval(second.stdout), strict=True)
    assert all(a != b for a, b in names)


def test_identity_is_unprivileged(sandbox: NativeSandbox) -> None:
    code = """
import os
status = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)
print(os.getresuid(), os.getresgid(), os.getpid(), os.getppid(), os.uname().nodename)
print([status[k].strip() for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')])
print(status['NoNewPrivs'].strip(), status['Seccomp'].strip())
"""
    lines = sandbox.execute(code).stdout.splitlines()
    assert lines[0] == "(1000, 1000, 1000) (1000, 1000, 1000) 2 1 sandbox"
    assert lines[1] == str(["0000000000000000"] * 5)
    assert lines[2] == "1 2"


def test_file_system_holds_nothing_of_the_host(sandbox: NativeSandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    hidden = ["/etc/passwd", "/etc/shadow", "/home", "/var", "/sys", "/run", "/boot", str(secret)]
    hidden += [str(Path(__file__).resolve()), "/proc/meminfo", "/proc/sys", "/proc/kallsyms"]
    code = f"import os; print([p for p in {hidden} if os.path.lexists(p)])"
    assert sandbox.execute(code).stdout == "[]\n"


def test_only_the_private_directories_are_writable(sandbox: NativeSandbox) -> None:
    code = """
import os, sys
def writable(directory):
    try:
        open(os.path.join(directory, 'probe'), 'w').close()
        return True
    except OSError:
        return False
print([d for d in ['/', '/usr', '/usr/lib', '/proc', '/dev', sys.prefix, sys.base_prefix,
                   '.', '/tmp', '/dev/shm'] if writable(d)])
"""
    assert sandbox.execute(code).stdout == "['.', '/tmp', '/dev/shm']\n"


def test_disk_use_is_bounded(sandbox: NativeSandbox) -> None:
    fill = "with open('f', 'wb') as f:\n    while True: f.write(b'x' * (1 << 20))"
    assert sandbox.execute(fill).status is Status.ERROR
    many = "for i in range(10**6): open(f'f{i}', 'w').close()"
    result = sandbox.execute(many)
    assert (result.status, "No space left" in result.stderr) == (Status.ERROR, True)


def test_environment_and_descriptors_of_the_owner_stay_outside(
    sandbox: NativeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "hunter2")
    code = """
import os
print('API_KEY' in os.environ, 'hunter2' in open('/proc/self/environ').read())
print(sorted(os.listdir('/proc/self/fd'))[:4], os.listdir('/proc'))
"""
    with NativeSandbox(slots=1) as later:
        first, second = later.execute(code).stdout.splitlines()
    assert first == "False False"
    # 3 is the listing's own descriptor.
    assert second == "['0', '1', '2', '3'] ['self', 'thread-self', '2']"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import socket as s; s.socket(s.AF_INET)", "Address family not supported"),
        ("import socket as s; s.socket(s.AF_INET6)", "Address family not supported"),
        ("import socket as s; s.socket(s.AF_VSOCK)", "Address family not supported"),
        ("import socket as s; s.socket(s.AF_PACKET, s.SOCK_RAW)", "Address family not supported"),
        ("import socket as s; s.socket(s.AF_NETLINK, s.SOCK_RAW)", "Address family not supported"),
        ("import os; os.setuid(0)", "Operation not permitted"),  # no such user in this namespace
        ("import os; os.chroot('/tmp')", "Operation not permitted"),
        ("import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", "not permitted"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (9999, 9999))",
            "not allowed to raise maximum limit",
        ),
        ("open('/proc/1/mem', 'rb').read(1)", "Error: [Errno"),
        ("open('/proc/1/environ', 'rb').read(1)", "Error: [Errno"),
    ],
)
def test_ways_out_are_closed(sandbox: NativeSandbox, code: str, error: str) -> None:
    result = sandbox.execute(code)
    assert (result.status, error in result.stderr) == (Status.ERROR, True), result
    assert sandbox.execute("print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    "call",
    [
        "ptrace(16, 1, 0, 0)",
        "mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
        "umount2(b'/tmp', 2)",
        "unshare(0x10000000)",
        "setns(0, 0)",
        "memfd_create(b'x', 0)",
        "process_vm_readv(1, None, 0, None, 0, 0)",
        "shmget(1, 4096, 0o1600)",
        "personality(0x0040000)",
    ],
)
def test_forbidden_system_calls_answer_eperm(sandbox: NativeSandbox, call: str) -> None:
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.{call}, ctypes.get_errno())
"""
    assert sandbox.execute(code).stdout == "-1 1\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 exists on x86_64 only")
def test_the_32_bit_system_call_gate_is_a_policy_kill(sandbox: NativeSandbox) -> None:
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, getpid; int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    result = sandbox.execute(code)
    assert (result.status, result.signal) == (Status.KILLED, signal.SIGSYS)


# --- life and death ------------------------------------------------------------------------------


def guests(owner: int) -> set[int]:
    """Pids of the zygotes below ``owner``; others may run sandboxes on this machine too."""
    return {process.pid for process in processes_of(owner) if is_guest(process.pid)}


def assert_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_guest, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_guest(pid)]


CLOSING = """
import os, sys, threading, time
sys.path.append(sys.argv[1])
from leaks import is_guest, processes_of
from thor_fast.sandbox import ExecutionRequest, NativeSandbox

before = set(os.listdir("/proc/self/fd"))
sandbox = NativeSandbox(slots=2)
spin = ExecutionRequest("while True: pass", timeout_s=600)
thread = threading.Thread(target=sandbox.execute, args=(spin,))
thread.start()
while not sandbox.stats()["running"]:
    time.sleep(0.01)
started = [process.pid for process in processes_of(os.getpid())]
assert any(map(is_guest, started)), started
sandbox.close()
left = [pid for pid in started if is_guest(pid)]
thread.join()
del sandbox, thread
print(left, set(os.listdir("/proc/self/fd")) - before)
"""


def test_close_leaves_nothing_behind() -> None:
    """In a process of its own: other sandboxes open and close descriptors at any moment."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CLOSING, Path(__file__).parent],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[] set()\n"), done.stderr


OWNER = """
import os, signal, sys, threading, time
from thor_fast.sandbox import NativeSandbox, ExecutionRequest
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where our starter ignores it
sandbox = NativeSandbox(slots=2)
sandbox.execute("print(1)")
run = lambda: sandbox.execute(ExecutionRequest("import time; time.sleep(600)", timeout_s=900))
threading.Thread(target=run, daemon=True).start()
while not sandbox.stats()["running"]:
    time.sleep(0.01)
{fork}
print("ready", flush=True)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "kill"),
    [
        ("pass", None),  # interpreter exit without close
        ("raise RuntimeError('x')", None),
        ("import os; os._exit(0)", None),
        ("time.sleep(600)", signal.SIGTERM),
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGINT),
    ],
)
def test_nothing_outlives_the_owner(ending: str, kill: signal.Signals | None) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER.format(fork="", ending=ending)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    started = guests(owner.pid)
    if kill is not None:
        assert started
        owner.send_signal(kill)
    owner.wait(timeout=60)
    owner.stdout.close()
    assert_gone(started)


def test_a_fork_that_outlives_the_owner_keeps_nothing_alive() -> None:
    """The fork holds a copy of every descriptor, the zygote's control socket among them."""
    fork = "if os.fork() == 0: time.sleep(250)"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER.format(fork=fork, ending="time.sleep(600)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        started = guests(owner.pid)
        owner.kill()
        owner.wait(timeout=60)
        assert started
        assert_gone(started)
        os.killpg(owner.pid, signal.SIGKILL)  # the fork


def test_a_killed_zygote_costs_only_what_it_ran() -> None:
    others = roles(os.getpid()).templates

    def strike() -> None:
        while not named(os.getpid(), "struck"):
            time.sleep(0.01)
        for zygote in roles(os.getpid(), others).zygotes:
            os.kill(zygote, signal.SIGKILL)

    with NativeSandbox(slots=1) as sandbox:
        killer = threading.Thread(target=strike)
        killer.start()
        sleep = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'struck'); time.sleep(600)"
        requests = [ExecutionRequest(sleep, timeout_s=600), "print('next')"]
        first, second = sandbox.execute_batch(requests)
        killer.join()
        assert first.status is Status.INFRA
        assert first.passed is None
        assert "died" in first.error
        assert second.stdout == "next\n"
        assert sandbox.stats()["jails_made"] >= 2


def _use(sandbox: NativeSandbox, queue: multiprocessing.Queue[str]) -> None:
    try:
        sandbox.execute("print(1)")
        queue.put("ran")
    except SandboxError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_is_told_to_make_its_own(sandbox: NativeSandbox) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_use, args=(sandbox, queue))
    child.start()
    assert "create one there" in queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert sandbox.execute("print(1)").stdout == "1\n"


def test_a_fork_that_drops_its_copy_neither_hangs_nor_harms() -> None:
    script = """
import os
from thor_fast.sandbox import NativeSandbox
sandbox = NativeSandbox(slots=1)
pid = os.fork()
if pid == 0:
    del sandbox  # deallocated, then an ordinary interpreter exit
else:
    assert os.waitpid(pid, 0)[1] == 0
    print(sandbox.execute("print('parent works')").stdout, end="")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "parent works\n"), done.stderr


# --- waiting -------------------------------------------------------------------------------------


def test_the_gil_is_free_while_waiting() -> None:
    """Only another thread can end the wait before the snippet's time is up."""
    with NativeSandbox(slots=1) as sandbox:

        def work() -> None:
            while not sandbox.stats()["running"]:
                time.sleep(0.001)
            for _ in range(100):
                time.sleep(0.001)
            sandbox.close()

        thread = threading.Thread(target=work)
        thread.start()
        result = sandbox.execute(ExecutionRequest("import time; time.sleep(600)", timeout_s=200))
        thread.join()
    assert (result.status, result.error) == (Status.INFRA, "the sandbox was closed")


def test_several_loops_and_threads_share_one_sandbox(sandbox: NativeSandbox) -> None:
    outputs: dict[int, list[str]] = {}

    def work(n: int) -> None:
        async def main() -> list[str]:
            results = await asyncio.gather(*(sandbox.submit(f"print({n})") for _ in range(20)))
            return [r.stdout for r in results]

        outputs[n] = asyncio.run(main())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {n: [f"{n}\n"] * 20 for n in range(4)}


def test_a_full_queue_answers_at_once() -> None:
    with NativeSandbox(slots=1, queue_capacity=1) as sandbox:
        slow = ExecutionRequest("import time; time.sleep(600)", timeout_s=600)
        with pytest.raises(SandboxError, match="queue holds 1 requests"):
            sandbox.execute_batch([slow] * 10)
        assert sandbox.execute("print(1)").stdout == "1\n"


def test_time_in_the_queue_does_not_count() -> None:
    with NativeSandbox(slots=1) as sandbox:
        slow = ExecutionRequest("import time; time.sleep(3)", timeout_s=60)
        result = sandbox.execute_batch([slow, ExecutionRequest("print(1)", timeout_s=2)])[1]
    assert result.status is Status.OK
    assert result.wall_s < 2


# --- setting it up -------------------------------------------------------------------------------


def test_limits_of_the_sandbox_apply_unless_the_request_names_its_own() -> None:
    with NativeSandbox(slots=1, limits=SandboxLimits(timeout_s=1)) as sandbox:
        sleep = "import time; time.sleep(1.5)"
        assert sandbox.execute(sleep).status is Status.TIMEOUT
        assert sandbox.execute(ExecutionRequest(sleep, timeout_s=60)).status is Status.OK


def test_preloaded_modules_are_there_and_random_numbers_still_differ() -> None:
    tier = Tier("numpy", ("numpy", "numpy.random"), ())
    with NativeSandbox(slots=1, tiers=[tier]) as sandbox:
        code = "import sys\nprint('numpy' in sys.modules)\nimport numpy\nprint(numpy.random.rand())"
        outputs = [sandbox.execute(code).stdout.splitlines() for _ in range(3)]
    assert {o[0] for o in outputs} == {"True"}
    assert len({o[1] for o in outputs}) == 3


_WHERE = "import os; print(*sorted(os.sched_getaffinity(0)))"


@pytest.mark.parametrize("first", [True, False])
def test_snippets_and_their_children_keep_to_the_cpus_given(first: bool) -> None:
    cpu = sorted(os.sched_getaffinity(0))[0 if first else -1]
    child = "import os\nif not os.fork():\n    " + _WHERE + "\nelse:\n    os.wait()"
    with NativeSandbox(cpus={cpu}) as sandbox:
        stream = sandbox.open()
        stream.feed(_WHERE + "\n")
        here = [sandbox.execute(_WHERE), sandbox.execute(child), stream.finish()]
    assert [result.stdout for result in here] == [f"{cpu}\n"] * 3


def test_without_cpus_snippets_run_where_we_may(sandbox: NativeSandbox) -> None:
    usable = " ".join(map(str, sorted(os.sched_getaffinity(0))))
    assert sandbox.execute(_WHERE).stdout == usable + "\n"


def test_there_are_as_many_slots_as_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    nap = "import time; time.sleep(0.06)"
    with NativeSandbox(cpus={cpu}) as sandbox:
        sandbox.execute(nap)
        started = time.monotonic()
        sandbox.execute_batch([nap] * 3)
        assert time.monotonic() - started >= 0.18


def test_bad_set_up_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="slots is 0, expected >= 1"):
        NativeSandbox(slots=0)
    usable = sorted(os.sched_getaffinity(0))
    for cpus in ((), (4096,), (-1, *usable)):
        with pytest.raises(ValueError, match=r"cpus is \[.*\], expected some of \[\d"):
            NativeSandbox(cpus=cpus)
    for senseless in (0, -1.0, 1e300, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"startup_timeout_s is .*, expected > 0"):
            NativeSandbox(startup_timeout_s=senseless)
    with pytest.raises(ValueError, match="timeout_s is 0, expected > 0"):
        SandboxLimits(timeout_s=0)
    with pytest.raises(SandboxError, match="No module named 'no_such_module'"):
        NativeSandbox(tiers=[Tier("t", ("no_such_module",), ())])
    with pytest.raises(ValueError, match="required layer is 'moat', expected one of"):
        NativeSandbox(required={"moat"})
