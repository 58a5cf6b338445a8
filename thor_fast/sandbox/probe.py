"""What this host grants of the layers the sandbox stands on, tried for real.

    python -m thor_fast.sandbox.probe

prints a table, with a remedy for each layer that is refused, and exits with status 1 if the
sandbox cannot do without one of them. What a layer is for: ``docs/sandbox-security.md``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from thor_fast import _core
from thor_fast.errors import SandboxError

__all__ = ["HostReport", "Layer", "probe"]

OPTIONAL = frozenset({"landlock", "memory_cgroup", "checkpoint_restore", "huge_pages"})
"""Layers without which the sandbox is slower or has one wall less, and says so."""

NOT_COVERED = (
    "kernel bugs (where they matter, put a virtual machine, gVisor or Firecracker around it all)",
    "side channels: caches, timing, speculative execution; CPU time and bandwidth are shared",
    "what lies readable below /usr and in the interpreter's environment",
)
"""What no layer here covers."""

_TIMEOUT_S = 60.0

# The module is loaded from its file: isolated and without `site`, nothing can have started a
# thread, and the package itself is not on the path.
_PROBE = """
import importlib.machinery, importlib.util, json, sys
loader = importlib.machinery.ExtensionFileLoader("_core", sys.argv[1])
core = importlib.util.module_from_spec(importlib.util.spec_from_loader("_core", loader))
loader.exec_module(core)
print(json.dumps(core.probe_host()))
"""

_NAMESPACES = frozenset(
    f"{name}_namespace"
    for name in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup", "time")
)
_MOUNTS = frozenset({"private_proc", "private_root", "checkpoint_restore"})

_KERNELS = {
    "time_namespace": "5.6 with CONFIG_TIME_NS",
    "private_root": "5.12 (mount_setattr)",
    "seccomp_filter": "3.17 with CONFIG_SECCOMP_FILTER",
    "no_new_privs": "3.5",
    "pidfd": "5.3",
    "close_range": "5.9",
    "clone3": "5.3",
    "landlock": "5.19 with CONFIG_SECURITY_LANDLOCK and landlock in the boot option lsm=",
    "checkpoint_restore": "any, with CONFIG_CHECKPOINT_RESTORE",
    "huge_pages": "6.1 with CONFIG_TRANSPARENT_HUGEPAGE",
}

_KERNEL_ONLY = frozenset({"landlock", "huge_pages"})  # no container runtime takes these away

_CONTAINER = (
    "in Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined, or "
    "--privileged; in Kubernetes: seccompProfile type Unconfined, procMount: Unmasked"
)
_CGROUPS = (
    "systemd: run under `systemd-run --user --scope` or in a service with Delegate=yes; Docker: "
    "mount the control groups read-write (--privileged); until then memory is bounded per process "
    "and by a watchdog"
)

# (file below /proc/sys, the value that forbids, what to do)
_SYSCTLS = (
    ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile (userns,)",
    ),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One thing the host can grant.

    ``detail``: of a refusal the call and the system's error, otherwise what a reader should know.
    ``required``: the sandbox does not start without it. ``remedy``: for a refusal, what helps.
    """

    name: str
    granted: bool
    detail: str
    required: bool
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """The layers in the order in which they were tried; printed as a table."""

    layers: tuple[Layer, ...]
    kernel: str

    def __getitem__(self, name: str) -> Layer:
        """The layer called ``name``. Raises ``KeyError``."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}, expected one of {[x.name for x in self.layers]}")

    @property
    def missing(self) -> tuple[Layer, ...]:
        """Refused, and the sandbox cannot do without."""
        return tuple(x for x in self.layers if x.required and not x.granted)

    @property
    def degraded(self) -> tuple[Layer, ...]:
        """Refused, and the sandbox can do without."""
        return tuple(x for x in self.layers if not x.required and not x.granted)

    def __str__(self) -> str:
        width = max(len(x.name) for x in self.layers)
        rows = [f"{x.name:<{width}}  {_verdict(x):<7}  {x.detail}".rstrip() for x in self.layers]
        remedies: dict[str, list[str]] = {}
        for layer in (*self.missing, *self.degraded):
            remedies.setdefault(layer.remedy, []).append(layer.name)
        lines = [f"Linux {self.kernel}", *rows]
        if remedies:
            lines += ["", "Remedies"]
            lines += [f"  {', '.join(names)}: {text}" for text, names in remedies.items()]
        lines += ["", "Covered by no layer", *(f"  {text}" for text in NOT_COVERED), ""]
        if self.missing:
            names = ", ".join(x.name for x in self.missing)
            return "\n".join([*lines, f"The sandbox cannot run here: no {names}."])
        return "\n".join([*lines, "The sandbox can run here."])


def probe() -> HostReport:
    """Try every layer in a process of its own, which leaves nothing behind; takes about 0.1 s.

    Raises ``SandboxError`` if that process fails.
    """
    command = [sys.executable, "-I", "-S", "-c", _PROBE, _core.__file__]
    try:
        done = subprocess.run(  # noqa: S603  (our own interpreter and code)
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env={}
        )
    except subprocess.TimeoutExpired:
        raise SandboxError(f"probing the host took longer than {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise SandboxError(
            f"the probing process ended with {done.returncode}, expected 0: {done.stderr.strip()}"
        )
    layers = []
    for name, granted, detail in json.loads(done.stdout):
        remedy = "" if granted else _remedy(name)
        layers.append(Layer(name, granted, detail, name not in OPTIONAL, remedy))
    return HostReport(tuple(layers), platform.release())


def _verdict(layer: Layer) -> str:
    if layer.granted:
        return "granted"
    return "MISSING" if layer.required else "absent"


def _remedy(name: str) -> str:
    if name == "memory_cgroup":
        return _CGROUPS
    if name in _NAMESPACES | _MOUNTS:
        forbidding = [
            text
            for path, value, text in _SYSCTLS
            if _read(f"/proc/sys/{path}") == value and _applies(path)
        ]
        if forbidding:
            return "; ".join(forbidding)
    if name not in _KERNEL_ONLY and _in_container():
        return _CONTAINER
    return (
        f"needs Linux {_KERNELS.get(name, '4.6')}, and neither a seccomp filter nor a security "
        "module that forbids it"
    )


def _applies(sysctl: str) -> bool:
    """Whether it binds us: root is bound only by the number of namespaces."""
    return os.geteuid() != 0 or sysctl.startswith("user/")


def _in_container() -> bool:
    marks = ("/.dockerenv", "/run/.containerenv")
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(Path(mark).exists() for mark in marks)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    report = probe()
    print(report)
    sys.exit(1 if report.missing else 0)
