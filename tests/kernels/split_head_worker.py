"""One rank of ``test_grpo_distributed``, given rank, ranks and a file to meet at; or it raises."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from thor_fast.kernels import KL, LossSpec, fused_linear_grpo, make_plan, selected_logprob

T, H, V = 14, 5, 36
MASK = torch.arange(T) % 5 != 3
BOUNDS = torch.tensor([0, 4, 7, 14])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5])
LEVEL = torch.tensor([0, 1, 1])

WIDE = KL("k2", beta=0.1, clamp_input=1e9, clamp_output=1e18)
SPLIT = {
    "ppo": (1.0, LossSpec(entropy=True, kl=KL(beta=0.1))),
    "softcap": (1.0, LossSpec(softcap=4.0, logit_scale=-0.8)),
    "gspo": (1.0, LossSpec(kind="gspo")),
    "entropy": (1.0, LossSpec(entropy_coef=0.1, softcap=4.0, logit_scale=1.2)),
    "entropy, by sequence": (1.0, LossSpec(kind="gspo", entropy_coef=-0.2, kl=KL(beta=0.1))),
    # Far beyond exp's range: the largest logit lies in one shard, and only that one shifts.
    "shards that shift": (400.0, LossSpec(entropy=True, kl=WIDE)),
    "shards that shift, entropy": (400.0, LossSpec(entropy_coef=0.1)),
    "shards that shift, by sequence": (400.0, LossSpec(kind="geo_mean", kl=WIDE)),
}


def problem(scale, dtype, columns_out):
    """hidden, weight, bias, targets and old log-probs; the first columns are out, and -inf."""
    gen = torch.Generator().manual_seed(0)
    hidden = (torch.randn(T, H, generator=gen, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(V, H, generator=gen, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=gen, dtype=torch.float64).to(dtype)
    bias[:columns_out] = -torch.inf
    targets = torch.randint(columns_out, V, (T,), generator=gen)
    logits = hidden @ weight.t() + bias
    logp = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None]).squeeze(1)
    targets[5] = -100
    return hidden, weight, bias, targets, logp + torch.randn(T, generator=gen) * 0.3


def run(leaves, targets, plan, old, **settings):
    hidden, weight, bias = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    out = fused_linear_grpo(hidden, weight, targets, plan, old, old + 0.1, bias=bias, **settings)
    out.loss.backward()
    return out, hidden.grad, weight.grad, bias.grad


def same(got, expected, precision):
    torch.testing.assert_close(got.isfinite(), expected.isfinite(), rtol=0, atol=0)
    largest = float(expected.detach().abs().nan_to_num(0, 0, 0).max())
    torch.testing.assert_close(
        got, expected, rtol=precision, atol=precision * largest, equal_nan=True
    )


def split_vocabulary(rank, ranks, scale, spec, dtype, target_out):
    here = V // ranks
    mine = slice(rank * here, (rank + 1) * here)
    # A whole shard without one finite logit; with a target in it, whose log-prob then is -inf.
    hidden, weight, bias, targets, old = problem(scale, dtype, here)
    if target_out:
        targets[0], targets[1] = 0, V
        spec = replace(spec, nll_alpha=0.0)
    plan = make_plan(MASK, LEVEL, advantages=ADVANTAGES, cu_seqlens=BOUNDS)
    leaves, part = (hidden, weight, bias), (hidden, weight[mine], bias[mine])
    out, by_hidden, by_weight, by_bias = run(leaves, targets, plan, old, spec=spec)
    got, got_hidden, got_weight, got_bias = run(
        part, targets, plan, old, spec=spec, vocab_group=dist.group.WORLD, chunk_rows=4
    )
    precision = 1e-5 if dtype is torch.float32 else 1e-11
    same(got.loss, out.loss, precision)
    same(got.logp, out.logp, precision)
    torch.testing.assert_close(
        got.entropy, out.entropy, rtol=precision, atol=precision, equal_nan=True
    )
    same(got_hidden, by_hidden, precision)
    same(got_weight, by_weight[mine], precision)
    same(got_bias, by_bias[mine], precision)
    # Old log-probs come the same way, of the same rows: a ratio of exactly 1.
    head = {"softcap": spec.softcap, "logit_scale": spec.logit_scale, "chunk_rows": 4}
    old_again = selected_logprob(
        *(hidden, weight[mine], targets, plan),
        bias=bias[mine],
        vocab_group=dist.group.WORLD,
        **head,
    )
    if len(plan.select(spec).rows) == len(plan.trainable.rows):
        assert torch.equal(old_again.nan_to_num(7), got.logp.nan_to_num(7))
    alone = selected_logprob(hidden, weight, targets, plan, bias=bias, **head)
    same(old_again, alone, precision)
    # All ranks add the same numbers in the same order: no optimizer drifts apart.
    for value in (got.loss.detach(), got_hidden, old_again):
        ours = [torch.empty_like(value) for _ in range(ranks)]
        dist.all_gather(ours, value.contiguous())
        assert all(torch.equal(one.nan_to_num(7), ours[0].nan_to_num(7)) for one in ours)


def sharded_head(rank, ranks, spec):
    """FSDP2's layout: each rank has rows of the head, and sequences of its own."""
    # Two ranks' affair alone, and slow to load.
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    hidden, weight, bias, targets, old = problem(1.0, torch.float64, 0)
    whole = make_plan(MASK, LEVEL, advantages=ADVANTAGES, cu_seqlens=BOUNDS)
    out, by_hidden, by_weight, _ = run((hidden, weight, bias), targets, whole, old, spec=spec)
    head = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    first, last = ((0, 1), (1, 3))[rank]
    mine = slice(int(BOUNDS[first]), int(BOUNDS[last]))
    plan = make_plan(
        MASK[mine],
        LEVEL[first:last],
        advantages=ADVANTAGES[first:last],
        cu_seqlens=BOUNDS[first : last + 1] - BOUNDS[first],
        normalizer=whole.counts,
    )
    states = hidden[mine].clone().requires_grad_()
    full = head.full_tensor(grad_placements=[Partial()])
    got = fused_linear_grpo(
        states, full, targets[mine], plan, old[mine], old[mine] + 0.1, spec=spec, bias=bias
    )
    got.loss.backward()
    total = got.loss.detach().clone()
    dist.all_reduce(total)
    same(total, out.loss.detach(), 1e-11)
    same(states.grad, by_hidden[mine], 1e-11)
    assert head.grad.placements == (Shard(0),)
    same(head.grad.full_tensor(), by_weight, 1e-11)
    try:
        fused_linear_grpo(states, head, targets[mine], plan, old[mine])
    except ValueError as error:
        assert "weight is a DTensor, expected a plain tensor" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a DTensor was taken as it is")


def main():
    rank, ranks, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for name, (scale, spec) in SPLIT.items():
        for dtype in (torch.float64, torch.float32):
            for target_out in (False, True):
                split_vocabulary(rank, ranks, scale, spec, dtype, target_out)
                print("equal:", name, dtype, target_out)
    if ranks == 2:
        for spec in (LossSpec(), LossSpec(kind="gspo", kl=KL(beta=0.1))):
            sharded_head(rank, ranks, spec)
        print("equal: sharded head")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
