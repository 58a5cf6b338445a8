"""The probe: what it finds, that refusals come with a remedy, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thor_fast import _core
from thor_fast.errors import SandboxError
from thor_fast.sandbox import NativeSandbox, probe
from thor_fast.sandbox.probe import NOT_COVERED, OPTIONAL, HostReport, Layer

# Takes user namespaces from itself, then becomes the probe.
NO_USER_NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.geteuid(), os.getegid()
assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())
for path, text in (
    ("self/setgroups", "deny"),
    ("self/uid_map", f"1000 {uid} 1"),
    ("self/gid_map", f"1000 {gid} 1"),
    ("sys/user/max_user_namespaces", "0"),
):
    with open("/proc/" + path, "w") as file:
        file.write(text)
os.execv(sys.executable, [sys.executable, "-P", "-m", "thor_fast.sandbox.probe"])
"""


@pytest.fixture(scope="module")
def report() -> HostReport:
    return probe.probe()


def _layer(name: str, *, granted: bool, required: bool = True, remedy: str = "") -> Layer:
    return Layer(name, granted, "" if granted else "unshare: Why (errno 1)", required, remedy)


def test_every_layer_is_judged_once(report):
    names = [layer.name for layer in report.layers]
    assert len(names) == len(set(names)) == 20
    assert set(names) >= OPTIONAL
    assert all(layer.required != (layer.name in OPTIONAL) for layer in report.layers)
    assert all(layer.granted or (layer.detail and layer.remedy) for layer in report.layers)
    assert set(report.missing) | set(report.degraded) == {x for x in report.layers if not x.granted}


def test_it_agrees_with_the_sandbox(report):
    if report.missing:
        with pytest.raises(SandboxError):
            NativeSandbox(slots=1)
    else:
        with NativeSandbox(slots=1) as sandbox:
            assert sandbox.execute("print(6 * 7)").stdout == "42\n"


def test_facts_can_be_checked_elsewhere(report):
    assert report["cpus"].detail == str(len(os.sched_getaffinity(0)))
    assert report.kernel == os.uname().release
    if os.geteuid() == 0 and report["user_namespace"].granted:
        assert report["user_namespace"].detail == "as uid 64999 of the host"
    if report["memory_cgroup"].granted:
        where = report["memory_cgroup"].detail.split(" at ")[1]
        assert Path(where, "cgroup.procs").exists()


LEAVING = """
import os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from leaks import control_groups
from IMPORT

def state():
    spaces = sorted(Path("/proc/self/ns").iterdir())
    return [
        [space.readlink() for space in spaces],
        os.listdir("/proc/self/fd"),
        Path("/proc/self/cgroup").read_text(),
    ]

before = state()
report = probe()
assert probe() == report
print(state() == before, control_groups(os.getpid()))
"""


@pytest.mark.parametrize(
    "way",
    [
        "thor_fast.sandbox.probe import probe",
        "thor_fast._core import probe_host as probe",
    ],
)
def test_it_leaves_its_process_alone(way):
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-W", "error", "-c", LEAVING.replace("IMPORT", way)),
            Path(__file__).parent,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True []\n"), done.stderr


def test_a_process_with_threads_cannot_probe_itself():
    code = """
import threading
from thor_fast import _core
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
try:
    _core.probe_host()
except RuntimeError as error:
    print(error)
stop.set()
thread.join()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == ("probe_host was called in a process with 2 threads, expected 1\n"), (
        done.stderr
    )


def test_refused_user_namespaces_end_with_status_1_and_a_remedy(report):
    if not report["user_namespace"].granted:
        pytest.skip("needs one user namespace to forbid others in")
    done = subprocess.run(
        [sys.executable, "-P", "-c", NO_USER_NAMESPACES],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("user_namespace ")]
    assert row.split(maxsplit=2)[1:] == [
        "MISSING",
        "unshare(CLONE_NEWUSER): No space left on device (errno 28)",
    ]
    (remedy,) = [line for line in lines if "max_user_namespaces" in line]
    assert remedy.startswith("  user_namespace, pid_namespace, ")
    assert remedy.endswith("sysctl user.max_user_namespaces=15000")
    assert any(line.startswith("seccomp_filter ") and " granted" in line for line in lines)
    assert lines[-1].startswith("The sandbox cannot run here: no user_namespace, ")


def test_a_container_is_told_about_its_runtime(monkeypatch):
    refused = [["private_proc", False, "mounting proc: Operation not permitted (errno 1)"]]
    refused += [["landlock", False, "Operation not supported (errno 95)"]]
    refused += [["memory_cgroup", False, "creating x: Read-only file system (errno 30)"]]
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps(refused))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(probe, "_read", lambda _: "")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    inside = probe.probe()
    assert "procMount: Unmasked" in inside["private_proc"].remedy
    assert "CONFIG_SECURITY_LANDLOCK" in inside["landlock"].remedy
    assert "Delegate=yes" in inside["memory_cgroup"].remedy
    assert [layer.name for layer in inside.missing] == ["private_proc"]
    assert [layer.name for layer in inside.degraded] == ["landlock", "memory_cgroup"]


@pytest.mark.parametrize(("uid", "expected"), [(0, "Linux 4.6"), (1000, "AppArmor profile")])
def test_what_binds_only_ordinary_users_is_not_told_to_root(monkeypatch, uid, expected):
    values = {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}
    monkeypatch.setattr(probe, "_read", lambda path: values.get(path, ""))
    monkeypatch.setattr(probe, "_in_container", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert expected in probe._remedy("user_namespace")


def test_the_table_is_aligned_and_says_what_is_not_covered():
    layers = (
        _layer("user_namespace", granted=True),
        _layer("seccomp", granted=False, remedy="a newer kernel"),
        _layer("landlock", granted=False, required=False, remedy="a newer kernel"),
    )
    report = HostReport(layers, "6.1.0")
    lines = str(report).splitlines()
    assert lines[:4] == [
        "Linux 6.1.0",
        "user_namespace  granted",
        "seccomp         MISSING  unshare: Why (errno 1)",
        "landlock        absent   unshare: Why (errno 1)",
    ]
    assert lines[4:7] == ["", "Remedies", "  seccomp, landlock: a newer kernel"]
    assert all(f"  {text}" in lines for text in NOT_COVERED)
    assert lines[-1] == "The sandbox cannot run here: no seccomp."
    enough = dataclasses.replace(report, layers=(layers[0], layers[2]))
    assert str(enough).endswith("The sandbox can run here.")
    with pytest.raises(KeyError, match=r"no layer 'x', expected one of \['user_namespace'"):
        _ = report["x"]


def test_a_probe_that_fails_says_how(monkeypatch, tmp_path):
    broken = tmp_path / "_core.so"
    broken.write_bytes(b"not an ELF file")
    monkeypatch.setattr(_core, "__file__", str(broken))
    with pytest.raises(SandboxError, match=r"ended with 1, expected 0: (?s:.*)_core\.so"):
        probe.probe()
