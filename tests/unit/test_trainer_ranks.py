"""Two processes (gloo) train as one does: data-parallel, and sharded by FSDP2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .training_run import run

SCRIPT = Path(__file__).parent / "training_run.py"
# Three groups over two ranks, and micro-batches of one sequence or two: the shares are not equal.
COMMON = {
    "train_prompts": 3,
    "micro_batch_tokens": 24,
    "checkpoint_every": 1,
    "recompute_old_logprobs": True,
    "rollout_weight_cap": 2.0,
}
# Sums in another order change the last of 24 bits; four steps of Adam at a rate of 1e-2 make 1e-5
# of it. A wrong denominator or a lost gradient is 1e-2.
BOUND = 1e-4


def launch(runs: list[dict]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    place = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), json.dumps(runs)],
            env={**os.environ, **ranks, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_train_as_one(tmp_path) -> None:
    """The sharded run is cut after two steps, and resumed."""
    folders = [tmp_path / "parallel", tmp_path / "sharded"]
    parallel, sharded = ({"output_dir": str(folder), **COMMON} for folder in folders)
    sharded["shard"] = True
    ranks = launch([parallel, {**sharded, "steps": 2}, {**sharded, "resume": True}])
    run(str(tmp_path / "one"), **COMMON)
    for process in ranks:
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
    expected = torch.load(tmp_path / "one" / "weights.pt")
    for folder in folders:
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        found = torch.load(folder / "weights.pt")
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            assert float((found[parameter] - value).abs().max()) < BOUND, parameter
        files = {path.name for path in (folder / "trajectories").iterdir()}
        assert {"step-000004-rank0.jsonl", "step-000004-rank1.jsonl"} <= files
