"""Walls that a host refuses, for real: an error by default, known to be missing where allowed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status
from thor_fast.sandbox.layers import REQUIRED_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SKIPPED = 77

# Goes on in a user namespace of its own, in which a limit is 0 or a system call is refused.
IN_A_POORER_HOST = """
import ctypes, json, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)

def in_own_user_namespace():
    up, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if libc.unshare(0x10000000) != 0:
            os._exit(77)
        os.write(up[1], b"x")
        os.read(go[0], 1)
        return
    os.read(up[0], 1)
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            ids = "0 0 65536"
        else:
            ids = f"{own} {own} 1"
            open(f"/proc/{child}/setgroups", "w").write("deny")
        open(f"/proc/{child}/{kind}_map", "w").write(ids)
    os.write(go[1], b"x")
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

def refuse_namespaces(kind):
    in_own_user_namespace()
    try:
        open(f"/proc/sys/user/max_{kind}_namespaces", "w").write("0")
    except OSError:
        os._exit(77)

def refuse_calls(*numbers):
    load = struct.pack("HBBI", 0x20, 0, 0, 0)
    answers = [struct.pack("HBBI", 0x15, 0, 1, number) + struct.pack("HBBI", 6, 0, 0, 0x50026)
               for number in numbers]  # SECCOMP_RET_ERRNO | ENOSYS
    allow = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)
    code = load + b"".join(answers) + allow
    keep = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(keep))
    libc.prctl(38, 1, 0, 0, 0)
    if libc.syscall(317, 1, 0, ctypes.create_string_buffer(program)) != 0:
        os._exit(77)
"""

TRY = """
from thor_fast.errors import SandboxError
from thor_fast.sandbox import NativeSandbox

def attempt(required):
    try:
        with NativeSandbox(slots=1, required=required) as sandbox:
            return sorted(sandbox.layers), sandbox.execute("print(6 * 7)").stdout
    except SandboxError as error:
        return None, str(error)

print(json.dumps([attempt(required) for required in json.loads(sys.argv[1])]))
"""


def attempts(refusal: str, *required: frozenset[str]) -> list[tuple[list[str] | None, str]]:
    """What comes of each ``required`` on a host with that refusal: layers and output, or error."""
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", IN_A_POORER_HOST + refusal + "\n" + TRY),
            json.dumps([sorted(each) for each in required]),
        ],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    if done.returncode == SKIPPED:
        pytest.skip("this host lets nobody refuse that")
    assert done.returncode == 0, done.stderr
    return [(layers, text) for layers, text in json.loads(done.stdout)]


@pytest.mark.parametrize("kind", ["net", "ipc", "uts", "cgroup", "time"])
def test_a_refused_namespace_is_an_error_unless_it_may_be_missing(kind: str) -> None:
    name = "network_namespace" if kind == "net" else f"{kind}_namespace"
    refused, lowered = attempts(
        f"refuse_namespaces({kind!r})", REQUIRED_LAYERS, REQUIRED_LAYERS - {name}
    )
    assert refused[0] is None
    assert "namespace" in refused[1]
    assert "No space left on device" in refused[1], "the system's own reason"
    assert lowered[1] == "42\n"
    assert lowered[0] is not None
    assert name not in lowered[0]
    assert set(lowered[0]) >= REQUIRED_LAYERS - {name}, "the others are all there"


@pytest.mark.parametrize("kind", ["user", "pid", "mnt"])
def test_an_indispensable_namespace_cannot_be_given_up(kind: str) -> None:
    ((layers, error),) = attempts(f"refuse_namespaces({kind!r})", frozenset())
    assert layers is None
    assert "namespace" in error
    assert "No space left on device" in error


needs_x86_64 = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="its system call numbers are those of x86_64"
)


@needs_x86_64
def test_refused_seccomp_is_an_error_unless_it_may_be_missing() -> None:
    refused, lowered = attempts("refuse_calls(317)", REQUIRED_LAYERS, REQUIRED_LAYERS - {"seccomp"})
    assert refused[0] is None
    assert "seccomp" in refused[1]
    assert lowered[1] == "42\n"
    assert lowered[0] is not None
    assert set(lowered[0]) & {"seccomp"} == set()
    assert set(lowered[0]) >= REQUIRED_LAYERS - {"seccomp"}


@needs_x86_64
def test_refused_landlock_is_noticed_only_by_who_asks_for_it() -> None:
    default, asked = attempts("refuse_calls(444)", REQUIRED_LAYERS, REQUIRED_LAYERS | {"landlock"})
    assert default[1] == "42\n"
    assert default[0] is not None
    assert "landlock" not in default[0]
    assert asked[0] is None
    assert "landlock" in asked[1].lower()


def test_layers_in_force_are_told() -> None:
    with NativeSandbox(slots=1) as sandbox:
        assert sandbox.layers >= REQUIRED_LAYERS
        assert ("memory_cgroup" in sandbox.layers) is _core.CgroupPool().granted


# --- without control groups ----------------------------------------------------------------------


class NoGroups:
    """As ``_core.CgroupPool`` is where none are delegated."""

    granted = False
    path = ""
    reason = "no hierarchy has the memory controller"


@pytest.fixture(scope="module")
def watched() -> Iterator[NativeSandbox]:
    """Its zygotes add up their snippets' memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "CgroupPool", NoGroups)
        sandbox = NativeSandbox(slots=1)
    with sandbox:
        yield sandbox


def test_required_groups_that_are_not_delegated_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_core, "CgroupPool", NoGroups)
    with pytest.raises(SandboxError, match=f"grant the layer memory_cgroup: {NoGroups.reason}"):
        NativeSandbox(slots=1, required=REQUIRED_LAYERS | {"memory_cgroup"})


BOMBS = {
    "one process": "x = bytearray(1 << 30)",
    "two processes": """
import os, time
os.fork()
held = bytearray(90 << 20)
for i in range(0, len(held), 4096): held[i] = 1
time.sleep(600)
""",
    "many processes": """
import os, time
for _ in range(7):
    if os.fork() == 0: break
held = bytearray(40 << 20)
for i in range(0, len(held), 4096): held[i] = 1
time.sleep(600)
""",
    "shared anonymous memory": """
import mmap, time
held = mmap.mmap(-1, 400 << 20)
for i in range(0, len(held), 4096): held[i] = 1
time.sleep(600)
""",
    "processes that left the family": """
import os, time
for _ in range(6):
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0: os._exit(0)
        held = bytearray(60 << 20)
        for i in range(0, len(held), 4096): held[i] = 1
        time.sleep(600)
time.sleep(600)
""",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_bombs_end_as_memory_without_groups(watched: NativeSandbox, bomb: str) -> None:
    assert "memory_cgroup" not in watched.layers
    request = ExecutionRequest(BOMBS[bomb], memory_bytes=128 * MIB, timeout_s=200)
    result = watched.execute(request)
    assert result.status is Status.MEMORY, result
    assert watched.execute("print('next')").stdout == "next\n"


def test_a_tree_within_its_limit_is_left_alone(watched: NativeSandbox) -> None:
    code = """
import os, time
pids = []
for _ in range(3):
    pids.append(os.fork())
    if pids[-1] == 0:
        held = b"x" * (20 << 20)
        time.sleep(0.3)
        os._exit(0)
print([os.waitpid(pid, 0)[1] for pid in pids])
"""
    result = watched.execute(ExecutionRequest(code, memory_bytes=128 * MIB))
    assert (result.status, result.stdout) == (Status.OK, "[0, 0, 0]\n"), result


# --- as an ordinary user -------------------------------------------------------------------------

AS_A_USER = """
import asyncio, json, os, sys
from thor_fast.sandbox import ExecutionRequest, NativeSandbox

def show(result):
    return [result.status.value, result.stdout, result.stderr[-300:], result.error]

with NativeSandbox(slots=2) as sandbox:
    shown = {"uid": os.getuid(), "layers": sorted(sandbox.layers)}
    for name, (code, limits) in json.load(sys.stdin).items():
        shown[name] = show(sandbox.execute(ExecutionRequest(code, **limits)))
        assert sandbox.execute("print(1)").stdout == "1\\n", name
    with sandbox.session(rewindable=True) as session:
        session.execute("x = 1")
        session.execute("x = 2")
        session.rewind()
        shown["session"] = show(session.execute("print(x)"))
    with sandbox.open() as block:
        block.feed("print(1)\\n")
        block.feed("print(2)\\n")
        shown["stream"] = show(block.finish())
    requests = [f"print({i})" for i in range(30)]
    assert [r.stdout for r in sandbox.execute_batch(requests)] == [f"{i}\\n" for i in range(30)]
    async def gather():
        return await asyncio.gather(*map(sandbox.submit, requests))
    assert [r.stdout for r in asyncio.run(gather())] == [f"{i}\\n" for i in range(30)]
print(json.dumps(shown))
"""

READ_ZYGOTE = """
found = []
for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/maps", "/proc/1/fd/0"):
    try:
        open(path, "rb").read(1)
        found.append(path)
    except OSError:
        pass
print(found)
"""
CASES: dict[str, tuple[str, dict[str, float], str, str]] = {
    "sum": ("print(6 * 7)", {}, "ok", "42\n"),
    "error": ("1 / 0", {}, "error", ""),
    "loop": ("while True: pass", {"timeout_s": 2}, "timeout", ""),
    "memory": ("bytearray(3 << 30)", {}, "memory", ""),
    "tree": (BOMBS["many processes"], {"memory_bytes": 128 * MIB}, "memory", ""),
    "output": ("print('x' * 5000)", {"max_output_bytes": 100}, "output", "x" * 50),
    "numpy": ("import numpy as np\nprint(np.arange(4).sum())", {}, "ok", "6\n"),
    "forks": ("import os\nwhile True: os.fork()", {"timeout_s": 2, "max_processes": 8}, "", ""),
    "parent": ("import os\ntry: os.kill(1, 9)\nexcept OSError: pass\nprint(1)", {}, "ok", "1\n"),
    "all": ("import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nprint(1)", {}, "", ""),
    "zygote": (READ_ZYGOTE, {}, "ok", "[]\n"),
    "ids": ("import os; print(os.getuid(), os.getpid(), os.getppid())", {}, "ok", "1000 2 1\n"),
    "root": ("import os; os.setuid(0)", {}, "error", ""),
    "write": ("open('/usr/x', 'w')", {}, "error", ""),
    "home": ("import os; print(os.path.exists('/etc/passwd'))", {}, "ok", "False\n"),
    "leave": ("open('/tmp/x', 'w').write('1')", {}, "ok", ""),
    "left": ("import os; print(os.path.lexists('/tmp/x'))", {}, "ok", "False\n"),
    "unshare": ("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))", {}, "ok", "-1\n"),
}


@pytest.fixture(scope="module")
def everybodys_python() -> Iterator[str]:
    """An interpreter that others may run, of this version, with copies of thor_fast and numpy."""
    name = f"python3.{sys.version_info.minor}"
    candidates = [sys._base_executable, shutil.which(name, path="/usr/bin:/usr/local/bin")]
    found = [path for path in candidates if path is not None and _others_may_run(path)]
    if not found:
        pytest.skip(f"no {name} that every user may run")
    open_to_all = next(path for path in (tempfile.gettempdir(), "/tmp") if _others_may_run(path))
    with tempfile.TemporaryDirectory(prefix="thor-everybody-", dir=open_to_all) as directory:
        Path(directory).chmod(0o755)
        subprocess.run(
            [found[0], "-m", "venv", "--without-pip", f"{directory}/venv"], check=True, timeout=120
        )
        site = Path(directory, "venv", "lib", name, "site-packages")
        package = site / "thor_fast"
        ignored = shutil.ignore_patterns("__pycache__", "tests", "_core.*.so")
        shutil.copytree(Path(_core.__file__).parent, package, ignore=ignored)
        shutil.copytree(_sources(), package, ignore=ignored, dirs_exist_ok=True)
        shutil.copy(_core.__file__, package)
        purelib = Path(sysconfig.get_path("purelib"))
        for module in ("numpy", "numpy.libs"):
            if (purelib / module).exists():
                shutil.copytree(purelib / module, site / module, ignore=ignored)
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True, timeout=60)
        yield f"{directory}/venv/bin/python"


def _sources() -> Path:
    spec = find_spec("thor_fast")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _others_may_run(path: str) -> bool:
    real = Path(path).resolve()
    return all(parent.stat().st_mode & 0o001 for parent in (real, *real.parents))


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_it_works_as_an_ordinary_user(everybodys_python: str) -> None:
    pytest.importorskip("numpy")
    done = subprocess.run(
        [everybodys_python, "-P", "-c", AS_A_USER],
        input=json.dumps({name: case[:2] for name, case in CASES.items()}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown.pop("uid") == 65534
    assert set(shown.pop("layers")) >= REQUIRED_LAYERS
    assert shown.pop("session")[:2] == ["ok", "1\n"]
    assert shown.pop("stream")[:2] == ["ok", "1\n2\n"]
    wrong = {
        name: shown[name]
        for name, (_, _, status, stdout) in CASES.items()
        if (status and shown[name][:1] != [status]) or not shown[name][1].startswith(stdout)
    }
    assert wrong == {}
    assert "infra" not in {result[0] for result in shown.values()}
