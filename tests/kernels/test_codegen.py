"""Offline code generation: no GPU is needed to see spills, registers or narrow loads.

Every kernel is compiled by the ptxas that ships with Triton, in a process of its own: Triton caches
where the environment says at import. It proves nothing about speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kernel_codegen.py"


# A100, H100 and H200, B200.
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_fits_registers_and_reads_wide(tmp_path, arch, capsys):
    found = tmp_path / "codes.json"
    printed = subprocess.run(
        [sys.executable, "-P", SCRIPT, "--arch", str(arch), "--json", found],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    codes = json.loads(found.read_text())
    splices = [code for code in codes if code["variant"]["kernel"] == "splice"]
    losses = [code for code in codes if code["variant"]["kernel"] != "splice"]
    kernels = {"row_sums", "logit_gradients", "loss_gradients"}
    assert {code["variant"]["kernel"] for code in losses} == kernels
    for code in losses:
        variant = code["variant"]
        assert code["arch"] == arch
        assert code["spilled_bytes"] == 0, code
        if variant["kernel"] == "loss_gradients":
            # One program, and no second beside it: the rows under way are to fit the L2 cache.
            assert 32 < code["registers"] <= 64, code
        # 64 registers let four programs of 8 warps share a multiprocessor, 80 three. Beyond that is
        # only a vocabulary that 16 does not divide, with everything else at once, on sm_100.
        assert code["registers"] <= (64 if variant["aligned"] else 80 if arch < 100 else 96), code
        if variant["aligned"]:
            assert code["widest_load"] >= 128, code
            assert code["widest_store"] >= (128 if variant["out"] else 32), code
    assert {code["variant"]["turned"] for code in splices} == {0, 32, 64, 128}
    for code in splices:
        assert code["spilled_bytes"] == 0, code
        # Five programs of 8 warps share a multiprocessor: what they have in flight covers latency.
        if code["variant"]["aligned"]:
            assert code["registers"] <= 48, code
            assert code["widest_load"] == code["widest_store"] == 128, code
        # Where part of a key is turned there is too little of it for every thread.
        if code["variant"]["aligned"] and code["variant"]["turned"] in (0, 128):
            assert code["narrowest_store"] == 128, code
    with capsys.disabled():
        print(f"\n{printed}")
