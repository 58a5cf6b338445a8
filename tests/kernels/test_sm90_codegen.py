"""Offline code generation for Hopper: no GPU is needed to see spills or narrow loads.

Every kernel is compiled for sm_90 by the ptxas that ships with Triton, and the machine code is
held to a register bound, no spills and 128-bit loads. It proves nothing about speed.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET replaces the compiler", allow_module_level=True)

from thor_fast.kernels.selected_logprob_triton import (
    BLOCK,
    NUM_WARPS,
    selected_logprob_row_kernel,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def _row_kernel_cubin(path: Path, *, bias: bool, aligned: bool) -> Path:
    """Compile as the launcher would: ``aligned`` is a vocabulary that 16 divides."""
    signature = {
        "logits_ptr": "*fp32",
        "targets_ptr": "*i64",
        "bias_ptr": "*fp32" if bias else "constexpr",
        "out_ptr": "*fp32",
        "row_stride": "i32",
        "vocab": "i32",
        "inverse_temperature": "fp32",
        "ignored": "constexpr",
        "block": "constexpr",
    }
    names = selected_logprob_row_kernel.arg_names
    assert list(signature) == names
    constants = {"ignored": -100, "block": BLOCK} | ({} if bias else {"bias_ptr": None})
    by_16 = [name for name, kind in signature.items() if kind.startswith("*")]
    by_16 += ["row_stride", "vocab"] if aligned else []
    compiled = triton.compile(
        ASTSource(
            selected_logprob_row_kernel,
            signature,
            constants,
            {(names.index(name),): [["tt.divisibility", 16]] for name in by_16},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": NUM_WARPS},
    )
    path.write_bytes(compiled.asm["cubin"])
    return path


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run(
        [CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
def test_selected_logprob_row_kernel(tmp_path, bias, aligned):
    cubin = _row_kernel_cubin(tmp_path / "row.cubin", bias=bias, aligned=aligned)
    usage = _cuobjdump("-res-usage", cubin)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    # 64 registers let four programs of 8 warps share a multiprocessor: its full 64 warps are 32.
    assert int(registers) <= 64
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]
    code = _cuobjdump("-sass", cubin)
    assert not re.search(r"\b(?:LDL|STL)\b", code)
    if aligned:
        assert "LDG.E.128" in code
