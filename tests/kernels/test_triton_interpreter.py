"""Runs interpreted_*.py in a process with Triton's interpreter on, and shows what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def _pytest(suite: Path, interpret: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)],
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_interpreted_suite(suite):
    done = _pytest(suite, "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_suites():
    assert SUITES


def test_without_interpreter_or_cuda_the_message_says_so():
    code = (
        "import torch; from thor_fast.kernels import selected_logprob as f\n"
        "f(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), impl='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "impl='triton' got tensors on cpu, expected CUDA (or TRITON_INTERPRET=1" in done.stderr
