"""How the zygote is started: which interpreter, what it may see, with which environment."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from thor_fast import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["STDLIB_PRELOAD", "zygote_command", "zygote_environment"]

STDLIB_PRELOAD = (
    "bisect",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "time",
    "typing",
)
"""What short numeric snippets import. All of it costs a fork under 0.1 ms."""

# Interpreter and shared libraries; the loader's cache spares a search on every library load.
_SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")


def zygote_command(preload: Iterable[str]) -> list[str]:
    """The zygote's argv: this interpreter, isolated, without ``site`` and its start-up hooks."""
    paths = sysconfig.get_paths()
    site_packages = list(dict.fromkeys((paths["purelib"], paths["platlib"])))
    config = {
        "core": _core.__file__,
        "paths": site_packages,
        "preload": list(preload),
        "readonly": _readonly_paths(site_packages),
    }
    guest = Path(__file__).with_name("_guest.py")
    return [sys.executable, "-I", "-S", str(guest), json.dumps(config)]


def zygote_environment() -> list[str]:
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
    ]


def _readonly_paths(site_packages: list[str]) -> list[str]:
    # A parent listed before its children makes them redundant, which the jail leaves out.
    wanted = [*_SYSTEM_PATHS, sys.base_prefix, sys.prefix, *site_packages]
    return [path for path in dict.fromkeys(wanted) if Path(path).exists()]
