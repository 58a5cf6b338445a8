"""Packed forward, loss and backward under FSDP2 on two processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from .two_ranks import on_two_ranks

SCRIPT = Path(__file__).parent / "sharded_training.py"
# Norm of the difference over the norm, loss and gradients: float32 as without FSDP2, bfloat16 by
# its own rounding (2.6e-2 was found).
BOUNDS = {"bfloat16": {"loss": 5e-3, "gradients": 5e-2}}


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    for found in on_two_ranks(SCRIPT, tmp_path):
        assert len(found) == 6
        for way, errors in found.items():
            for name, error in errors.items():
                assert error < BOUNDS.get(way, {}).get(name, 1e-5), (way, errors)
