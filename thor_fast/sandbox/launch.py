"""How templates are started: which interpreter, what it may see, with which environment."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from thor_fast import _core

if TYPE_CHECKING:
    from collections.abc import Collection

    from thor_fast.sandbox.tiers import Tier
    from thor_fast.sandbox.wire import Determinism

__all__ = ["template_command", "template_environment"]

# Interpreter and shared libraries; the loader's cache spares a search on every library load.
_SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")


def template_command(
    tier: Tier,
    required: Collection[str],
    determinism: Determinism | None,
    cgroups: _core.CgroupPool | None,
) -> list[str]:
    """A template's argv: this interpreter without ``site`` and its start-up hooks.

    Not ``-I``: the environment is ours alone, and it fixes the hash seed.
    """
    paths = sysconfig.get_paths()
    site_packages = list(dict.fromkeys((paths["purelib"], paths["platlib"])))
    config = {
        "core": _core.__file__,
        "paths": site_packages,
        "preload": tier.modules,
        "routines": tier.routines,
        "deterministic": determinism is not None,
        "jail": {
            "readonly": _readonly_paths(site_packages),
            "required": sorted(required),
            "memory_cgroup": cgroups is not None,
            "cgroup_path": "" if cgroups is None else cgroups.path,
        },
    }
    guest = Path(__file__).with_name("guest") / "bootstrap.py"
    return [sys.executable, "-P", "-S", "-s", "-B", str(guest), json.dumps(config)]


def template_environment(determinism: Determinism | None) -> list[str]:
    """The whole environment of every snippet: nothing of ours, so no secret of ours."""
    return [
        "HOME=/tmp/work",
        "LANG=C.UTF-8",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "TMPDIR=/tmp",
        # A thread pool in the zygote would not survive a fork, and its locks would.
        "OPENBLAS_NUM_THREADS=1",
        "OMP_NUM_THREADS=1",
        "MKL_NUM_THREADS=1",
        # Each malloc arena reserves 64 MB of the address space that RLIMIT_AS counts.
        "MALLOC_ARENA_MAX=2",
        # What the loader leaves for the first call of a function, every fork would do anew.
        "LD_BIND_NOW=1",
        # One seed for all snippets of a template, as they are forks of one interpreter.
        f"PYTHONHASHSEED={'random' if determinism is None else determinism.seed % 2**32}",
    ]


def _readonly_paths(site_packages: list[str]) -> list[str]:
    # A parent listed before its children makes them redundant, which the jail leaves out.
    wanted = [*_SYSTEM_PATHS, sys.base_prefix, sys.prefix, *site_packages]
    return [path for path in dict.fromkeys(wanted) if Path(path).exists()]
