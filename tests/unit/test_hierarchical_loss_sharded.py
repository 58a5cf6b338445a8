"""A head that FSDP2 shards over two processes is gathered, and its gradient averaged, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from .two_ranks import on_two_ranks

SCRIPT = Path(__file__).parent / "sharded_head.py"


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_a_sharded_head_has_the_gradient_of_the_whole(tmp_path):
    shares = []
    for found in on_two_ranks(SCRIPT, tmp_path):
        assert max(found["errors"].values()) < 1e-12, found
        shares.append(found["shares"])
    assert shares == [[4, 4], [3, 3]]  # rows of the weight [7, 4] and of the bias [7]
