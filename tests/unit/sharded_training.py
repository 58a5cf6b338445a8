"""A rank of two that train one model, sharded by FSDP2. Run by test_sharded_training.

``sharded_training.py RANK STORE``; prints a JSON line: for each way to shard, how far the loss and
the gradients are from one process that has all sequences.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).parent))

from training_problem import make_model, make_sequences

from thor_fast.kernels import Counts, LossSpec
from thor_fast.rl import HierarchicalGRPOLoss, TrainingBatch, hidden_states, pack

RANKS = 2
# No clipping: a ratio at a bound would make rounding errors visible.
LOSS = HierarchicalGRPOLoss(LossSpec(clip_low=1.0, clip_high=1e9, dual_clip=None))
NOTHING = Counts((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS = {
    "layers and the rest": {},
    "prefixes shared": {"share": True},
    "a head of its own": {"own_head": True},
    "tied": {"tied": True},
    "checkpointed": {"checkpointed": True},
    "bfloat16": {"policy": BFLOAT16},
}


def batches_of(rank: int, *, share: bool) -> list[TrainingBatch]:
    """Two micro-batches of a rank, with the counts of the step."""
    parts = [
        pack(make_sequences()[r::RANKS], max_tokens=50, share_prefixes=share) for r in range(RANKS)
    ]
    assert all(len(part) == 2 for part in parts)
    counts = sum((part[0].counts for part in parts), NOTHING)
    return [dataclasses.replace(batch, counts=counts) for batch in parts[rank]]


def step(model: PreTrainedModel, batches: list[TrainingBatch], factor: float) -> float:
    total = 0.0
    for batch in batches:
        loss = LOSS(hidden_states(model, batch), model.lm_head, batch).loss * factor
        loss.backward()
        total += float(loss.detach())
    return total


def compare(
    rank: int,
    *,
    share: bool = False,
    own_head: bool = False,
    tied: bool = False,
    checkpointed: bool = False,
    policy: MixedPrecisionPolicy | None = None,
) -> dict[str, float]:
    whole = make_model(tied=tied)
    everything = [b for r in range(RANKS) for b in batches_of(r, share=share)]
    expected = step(whole, everything, 1.0)
    model = make_model(tied=tied).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    settings = {} if policy is None else {"mp_policy": policy}
    units: list[nn.Module] = [*model.model.layers, *([model.lm_head] if own_head else []), model]
    for unit in units:
        fully_shard(unit, **settings)
    # FSDP2 takes the mean over ranks.
    own = step(model, batches_of(rank, share=share), RANKS)
    losses = [None] * RANKS
    dist.all_gather_object(losses, own)
    errors = [abs(sum(losses) / RANKS - expected) / abs(expected)]
    for (name, truth), parameter in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None, name
        found = parameter.grad.full_tensor()
        errors.append(float((found - truth.grad).norm() / truth.grad.norm()))
    return {"loss": errors[0], "gradients": max(errors[1:])}


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=5),
    )
    found = {name: compare(rank, **way) for name, way in WAYS.items()}
    dist.destroy_process_group()
    print(json.dumps(found), flush=True)
    # Without an exit: there torch 2.13 aborts once in ten, a thread of gloo's being left.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
