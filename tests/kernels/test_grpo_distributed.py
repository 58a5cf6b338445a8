"""The head over several processes (gloo): split by vocabulary, and sharded as FSDP2 does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from thor_fast.kernels import LossSpec, fused_linear_grpo

WORKER = Path(__file__).with_name("split_head_worker.py")


# 36 columns over 2 and 3 ranks; with 2 also a DTensor.
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_give_what_one_process_gives(ranks, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(rank), str(ranks), str(tmp_path / "meeting")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    assert all("equal: shards that shift, by sequence torch.float32 True" in text for text in said)
    assert all(("equal: sharded head" in text) == (ranks == 2) for text in said)


@pytest.fixture
def group_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch puts its own there, for good
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("spec", [LossSpec(), LossSpec(entropy_coef=0.1)])
def test_a_group_of_one_has_the_whole_vocabulary(make_grpo_batch, group_of_one, spec):
    batch = make_grpo_batch(seed=61)
    args = (batch.hidden, batch.weight, batch.targets, batch.plan(), *batch.rows)
    settings = {"bias": batch.bias, "spec": spec}
    plain = fused_linear_grpo(*args, **settings)
    split = fused_linear_grpo(*args, **settings, vocab_group=group_of_one)
    assert torch.equal(split.loss, plain.loss)
    got, want = (torch.autograd.grad(out.loss, batch.leaves) for out in (split, plain))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
