"""Runs mypy --strict on thor_fast as it is installed, from a directory that is not the source tree.

That is what users' type checkers see: kernels under thor_fast.kernels, py.typed, _core.pyi. An
editable install leaves the kernels outside the package; then a copy laid out like the wheel is
checked instead.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lay_out_package(directory: Path) -> None:
    """Copy the sources into ``directory`` as a wheel has them."""
    package = directory / "thor_fast"
    shutil.copytree(ROOT / "thor_fast", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "kernels",
        package / "kernels",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )


def main() -> int:
    """Run mypy; its exit code."""
    installed = Path(sysconfig.get_path("platlib"), "thor_fast", "py.typed").exists()
    with tempfile.TemporaryDirectory(prefix="thor-types-") as directory:
        if not installed:
            lay_out_package(Path(directory))
        print(f"checking {'the installed package' if installed else 'a copy laid out as one'}")
        config = f"--config-file={ROOT / 'pyproject.toml'}"
        command = [sys.executable, "-m", "mypy", config, "-p", "thor_fast"]
        return subprocess.run(command, cwd=directory, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
