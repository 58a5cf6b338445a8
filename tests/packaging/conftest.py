"""Builds the wheel and the sdist once; every packaging test looks at these two files."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _build_wheel(source: Path, scratch: Path, python: str = sys.executable) -> Path:
    """Build ``source`` for ``python``; the build tree stays out of the sources."""
    # What a build environment would hold is there already, or pip makes one.
    modules = ("scikit_build_core", "pybind11", *([] if shutil.which("cmake") else ["cmake"]))
    ready = python == sys.executable and all(map(importlib.util.find_spec, modules))
    _run(
        *(python, "-P", "-m", "pip", "wheel", "-q", "--no-deps", source, "-w", scratch / "out"),
        *(["--no-build-isolation"] if ready else []),
        *("-C", f"build-dir={scratch / 'build'}"),
        cwd=scratch,
    )
    (wheel,) = (scratch / "out").glob("thor_fast-*.whl")
    return wheel


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Run a command, assert that it succeeds, return what it printed."""
    return _run


@pytest.fixture(scope="session")
def build_wheel() -> Callable[..., Path]:
    return _build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(out)!r})"
    _run(sys.executable, "-P", "-c", code, cwd=ROOT)
    (path,) = out.glob("thor_fast-*.tar.gz")
    return path
