"""``benchmarks/gpu_suite.sh`` as far as a machine without a GPU goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def test_it_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        ([], sys.executable, "torch sees no GPU: 2."),
        (["a", "b"], sys.executable, "got 2 arguments, expected at most one"),
        ([], "false", "false is "),
    ],
)
def test_what_is_missing_is_one_line(arguments: list[str], python: str, message: str) -> None:
    done = run(*arguments, python=python)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"gpu_suite: error: {message}")
