"""The walls of a jail that a host may lack, by name, and which of them are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thor_fast.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Collection

    from thor_fast._core import CgroupPool

__all__ = ["OPTIONAL_LAYERS", "REQUIRED_LAYERS", "check_layers"]

REQUIRED_LAYERS = frozenset(
    {
        "network_namespace",
        "ipc_namespace",
        "uts_namespace",
        "cgroup_namespace",
        "time_namespace",
        "seccomp",
    }
)
"""Without one of these a sandbox does not start, unless its caller says so.

User, pid and mount namespaces, dropped capabilities and rlimits cannot be given up at all.
"""

OPTIONAL_LAYERS = frozenset({"landlock", "memory_cgroup"})
"""Second walls, used where the host has them. Without a memory control group the memory of a
snippet's processes is added up every 50 ms instead."""


def check_layers(required: Collection[str], cgroups: CgroupPool) -> frozenset[str]:
    """Those of ``required`` that the jail itself has to see to.

    Raises ``ValueError`` for an unknown name, ``SandboxError`` where memory control groups are
    required and not delegated to this process.
    """
    known = REQUIRED_LAYERS | OPTIONAL_LAYERS
    for name in required:
        if name not in known:
            raise ValueError(f"required layer is {name!r}, expected one of {sorted(known)}")
    if "memory_cgroup" in required and not cgroups.granted:
        raise SandboxError(f"the host does not grant the layer memory_cgroup: {cgroups.reason}")
    return frozenset(required) - {"memory_cgroup"}
