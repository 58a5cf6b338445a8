"""The interpreter that every backend but ours starts: a virtual environment made for the run.

An environment that people work in runs start-up hooks (``.pth`` files that import something, a
``sitecustomize``), which multiply the time an interpreter needs to start; a baseline slowed down
that way would flatter whoever does not start one. The fresh environment reads the packages of the
one the benchmark runs in, by a ``.pth`` file that only names their folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from thor_fast.errors import SandboxError

__all__ = ["Interpreter", "bare_interpreter"]

# Runs in the interpreter under test; the hooks are what site would run or import at start-up.
_PROBE = """
import importlib.util, json, pathlib, platform, site
hooks = [
    str(file)
    for folder in site.getsitepackages()
    for file in sorted(pathlib.Path(folder).glob('*.pth'))
    if any(line.startswith(('import ', 'import\\t')) for line in file.read_text().splitlines())
]
for name in ('sitecustomize', 'usercustomize'):
    spec = importlib.util.find_spec(name)
    if spec is not None:
        hooks.append(str(spec.origin))
import numpy, sympy
print(json.dumps({
    'hooks': hooks,
    'versions': {
        'python': platform.python_version(),
        'numpy': numpy.__version__,
        'sympy': sympy.__version__,
    },
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """``path``: the executable. ``readonly``: what a jail must show for it to run, with packages.

    ``hooks``: files it would import or run at every start; none, unless the system's Python has a
    ``sitecustomize``.
    """

    path: str
    readonly: tuple[str, ...]
    hooks: tuple[str, ...]
    versions: dict[str, str]


@contextmanager
def bare_interpreter() -> Iterator[Interpreter]:
    """A new environment in a temporary folder.

    Raises ``SandboxError`` if numpy or sympy cannot be imported there.
    """
    paths = sysconfig.get_paths()
    packages = list(dict.fromkeys((paths["purelib"], paths["platlib"])))
    with tempfile.TemporaryDirectory(prefix="sandbox-latency-") as folder:
        root = Path(folder, "venv")
        venv.EnvBuilder(symlinks=True).create(root)
        (purelib,) = root.glob("lib/python3*/site-packages")
        purelib.joinpath("packages.pth").write_text("\n".join(packages) + "\n")
        path = str(root / "bin" / "python")
        probe = subprocess.run(
            [path, "-I", "-c", _PROBE], capture_output=True, text=True, check=False
        )
        if probe.returncode != 0:
            problem = (probe.stderr.strip() or "no message").splitlines()[-1]
            raise SandboxError(
                f"{sys.executable}: {problem}; expected numpy and sympy: pip install numpy sympy"
            )
        found = json.loads(probe.stdout)
        system = [p for p in ("/usr", "/lib", "/lib64", "/bin") if Path(p).exists()]
        yield Interpreter(
            path=path,
            readonly=tuple(dict.fromkeys([*system, sys.base_prefix, str(root), *packages])),
            hooks=tuple(found["hooks"]),
            versions=found["versions"],
        )
