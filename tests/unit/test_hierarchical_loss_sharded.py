"""A head that FSDP2 shards over two processes is gathered, and its gradient averaged, exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parent / "sharded_head.py"


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_a_sharded_head_has_the_gradient_of_the_whole(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=600) for rank in ranks]
    shares = []
    for rank, (stdout, stderr) in zip(ranks, done, strict=True):
        assert rank.returncode == 0, stderr
        found = json.loads(stdout)
        assert max(found["errors"].values()) < 1e-12, found
        shares.append(found["shares"])
    assert shares == [[4, 4], [3, 3]]  # rows of the weight [7, 4] and of the bias [7]
