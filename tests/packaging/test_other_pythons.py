"""The wheel builds for the other Pythons we support, and its sandbox runs there with numpy only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OTHERS = [minor for minor in (11, 12, 13) if sys.version_info[:2] != (3, minor)]


def _interpreter(minor: int) -> str | None:
    """A working Python 3.``minor``: on PATH, or one that pyenv has installed."""
    found = shutil.which(f"python3.{minor}")
    pyenv = Path("~/.pyenv/versions").expanduser()
    candidates = [found, *sorted(map(str, pyenv.glob(f"3.{minor}.*/bin/python")))]
    for candidate in filter(None, candidates):
        code = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, {minor}))"
        if (
            subprocess.run([candidate, "-c", code], capture_output=True, check=False).returncode
            == 0
        ):
            return candidate
    return None


@pytest.mark.slow
@pytest.mark.parametrize("minor", OTHERS)
def test_wheel_for_another_python(minor, root, build_wheel, run, tmp_path):
    interpreter = _interpreter(minor)
    if interpreter is None:
        pytest.skip(f"no Python 3.{minor} with venv on PATH or in pyenv")
    run(interpreter, "-m", "venv", tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")
    wheel = build_wheel(root, tmp_path, python)
    assert f"-cp3{minor}-" in wheel.name
    constraints = root / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, "--only-binary=:all:", "numpy")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    code = (
        "from thor_fast.sandbox import NativeSandbox\n"
        "with NativeSandbox() as s: print(s.execute('print(6 * 7)').stdout.strip())"
    )
    assert run(python, "-W", "error", "-c", code, cwd=tmp_path) == "42\n"
