"""A rank of two: its batch through a head that FSDP2 shards. Run by test_hierarchical_loss_sharded.

``sharded_head.py RANK STORE``; prints a JSON line: how far from one process that has both batches.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from thor_fast.rl import HierarchicalGRPOLoss, TrainingBatch

VOCAB, HIDDEN, TOKENS, RANKS = 7, 4, 6, 2


def make_batch(rank: int) -> tuple[torch.Tensor, TrainingBatch]:
    """Hidden states [T, H] and the batch of a rank."""
    gen = torch.Generator().manual_seed(rank)
    batch = TrainingBatch(
        token_ids=torch.randint(0, VOCAB, (TOKENS,), generator=gen),
        cu_seqlens=torch.tensor([0, TOKENS]),
        loss_mask=torch.tensor([0, 1, 1, 0, 1, 1]),
        level=rank,
        advantages=torch.tensor([1.0 + rank]),
        old_logprobs=torch.full((TOKENS,), -2.0),
    )
    hidden = torch.randn(TOKENS, HIDDEN, generator=gen, dtype=torch.float64)
    return hidden.requires_grad_(), batch


def make_head() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(HIDDEN, VOCAB, dtype=torch.float64)


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=5),
    )
    loss = HierarchicalGRPOLoss()
    whole = make_head()
    values = [loss(hidden, whole, batch).loss for hidden, batch in map(make_batch, range(RANKS))]
    (sum(values) / RANKS).backward()  # FSDP2 takes the mean over ranks

    head = make_head()
    fully_shard(head)
    hidden, batch = make_batch(rank)
    found = loss(hidden, head, batch).loss
    found.backward()
    shares = [len(p.to_local()) for p in head.parameters()]
    errors = {"loss": float((found - values[rank]).abs())}
    for name in ("weight", "bias"):
        gradient = getattr(head, name).grad.full_tensor()
        errors[name] = float((gradient - getattr(whole, name).grad).abs().max())
    dist.destroy_process_group()
    print(json.dumps({"errors": errors, "shares": shares}), flush=True)
    # Without an exit: there torch 2.13 aborts once in ten, a thread of gloo's being left.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
