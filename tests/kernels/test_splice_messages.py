"""KV splicing: what is refused, and what the message says."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thor_fast.kernels import (
    KVView,
    MoveCounts,
    Rope,
    SplicePlan,
    approx_plan_drop,
    plan_append,
    plan_compact,
    plan_fork,
    plan_move,
    plan_truncate,
    splice,
)

ROPE = Rope(((1.0, 0.1),))
SPARE = np.zeros(8, np.bool_)


def rows(*segments: list[int]) -> np.ndarray:
    return np.array(segments, np.int32).reshape(-1, 4)


def kv(layers: int = 2, blocks: int = 8, size: int = 4, **settings: object) -> torch.Tensor:
    return torch.zeros(layers, 2, blocks, size, 2, 8, **settings)


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVView.stacked(kv()[0]), r"shape \(2, 8, 4, 2, 8\), expected \(L, 2, NB, BS, H"),
        (lambda: KVView.pools([], []), "keys of 0 layers and values of 0, expected as many"),
        (
            lambda: KVView.pools([torch.zeros(2, 4, 2, 8)], [torch.zeros(2, 4, 1, 8)]),
            r"values have shape \(2, 4, 1, 8\), expected \(NB, BS, H, DV\) with \(2, 4, 2\)",
        ),
        (
            lambda: KVView.pools([torch.zeros(2, 4, 2, 8)], [torch.zeros(2, 4, 2, 8).half()]),
            "values are torch.float16 on cpu, expected torch.float32 on cpu like keys",
        ),
        (
            lambda: KVView.stacked(kv(dtype=torch.uint8)),
            "keys are torch.uint8, expected float32, bfloat16, float16 or float64: a quantised",
        ),
        (
            lambda: KVView.stacked(kv().transpose(4, 5)),
            "expected 1 in the last dimension",
        ),
        (
            lambda: KVView.stacked(kv(blocks=0)),
            r"shape \(0, 4, 2, 8\), expected \(NB, BS, H, D\), none of them 0",
        ),
        (
            lambda: KVView.pools([kv()[0, 0], kv(size=2)[0, 0]], list(kv()[:, 1])),
            r"keys of layer 1 have .*\(8, 2, 2, 8\).*, expected .*\(8, 4, 2, 8\).* as in layer 0",
        ),
        (
            lambda: KVView.vllm([torch.zeros(8, 1, 16, 576)], 512),
            r"layer 0 has shape \(8, 1, 16, 576\), expected \(NB, H, BS, 1024\)",
        ),
        (
            lambda: KVView.stacked(torch.zeros(1, 2, 1, 1, 1, 1).expand(1, 2, 2**29, 4, 1, 1)),
            "there are 536870912 blocks of 4 tokens, expected below 2\\^31",
        ),
    ],
)
def test_views(call, message):
    refused(call, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SplicePlan(rows(), 0), "block_size is 0 and source_block_size 0, expected at"),
        (lambda: SplicePlan(np.zeros((1, 3), np.int32), 4), r"shape \(1, 3\), expected int32 \(n"),
        (lambda: SplicePlan(np.zeros((1, 4)), 4), r"segments are float64 of shape \(1, 4\)"),
        (lambda: SplicePlan(rows([2, 8, 3, -1]), 4), r"\[2, 8, 3, -1\], expected a source of at"),
        (lambda: SplicePlan(rows([0, 6, 3, -1]), 4), "expected a destination of at least one tok"),
        (lambda: SplicePlan(rows([0, 4, 0, -1]), 4), "expected a source of at least one token"),
        (lambda: SplicePlan(rows([-1, 4, 1, -1]), 4), "expected a source of at least one token"),
        (
            lambda: SplicePlan(rows([0, 4, 3, -1], [0, 6, 1, -1]), 4),
            "slot 6 is written twice, by segments 0 and 1, expected once",
        ),
        (lambda: SplicePlan(rows([0, 4, 1, 0]), 4), r"from 0 to 0, expected from -1 \(none\) to "),
        (
            lambda: SplicePlan(rows([0, 4, 1, 0]), 4, rope=ROPE, rotations=np.zeros((1, 3, 2))),
            r"rotations have shape \(1, 3, 2\), expected \(1, 2, 2\)",
        ),
        (
            lambda: SplicePlan(rows([0, 4, 1, -1]), 4, lanes=np.array([0, 2], np.int32)),
            r"lanes are \[0, 2\], expected int32, rising from 0 to the 1 segments",
        ),
        (
            lambda: SplicePlan(rows(), 4) + SplicePlan(rows(), 8),
            r"plans are for blocks of \(written, read\) \(4, 4\) and \(8, 8\) tokens, expected the",
        ),
        (
            lambda: (
                SplicePlan(rows(), 4, rope=ROPE) + SplicePlan(rows(), 4, rope=Rope(((2.0, 0.1),)))
            ),
            "plans have the ropes .*, expected the same",
        ),
    ],
)
def test_plans(call, message):
    refused(call, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plan_fork([5, 5], [1, 5], 3, 4),
            "tail 5 is in the parent's table, expected fresh",
        ),
        (lambda: plan_fork([5], [1, 1], 3, 4), "slot 4 is written twice"),
        (lambda: plan_fork([5], [1], 6, 4), "blocks are asked for positions 4 to 4, expected with"),
        (lambda: plan_fork([0.5], [1], 3, 4), "blocks are float64 of shape .*, expected a list of"),
        (lambda: plan_fork([-1], [1], 3, 4), "blocks have block -1, expected at least 0"),
        (lambda: plan_fork([2**30], [1], 3, 4), "slot 4294967296 is asked for, expected below 2"),
        (
            lambda: plan_truncate([5, 1], 6, 4, writable=()),
            "block 1 is shared or hashed and holds 2 of the tokens that stay, expected a fresh",
        ),
        (
            lambda: plan_append([5], 3, 2, 4, writable={5}, source_tokens=2),
            "blocks are asked for positions 3 to 4, expected within their 1 blocks of 4 tokens",
        ),
        (
            lambda: plan_append([5], 0, 2, 4, writable={5}, source_tokens=2, source_start=1),
            "source are asked for positions 1 to 2, expected within their 1 blocks of 2 tokens",
        ),
        (
            lambda: plan_append([5], 0, 2, 4, writable={4}, source_tokens=2),
            "block 5 would be written and has more than one reference or a registered hash",
        ),
        (
            lambda: plan_append([5], 0, 2, 4, writable=SPARE, source_tokens=2),
            "block 5 would be written and has more than one reference or a registered hash",
        ),
        (
            lambda: plan_append([9], 0, 2, 4, writable=SPARE, source_tokens=2),
            "writable is of 8 blocks, expected it to say about 9",
        ),
        (
            lambda: plan_append([5], 0, 2, 4, writable=np.array([5]), source_tokens=2),
            r"writable is int64 of shape \(1,\), expected bool \(NB,\) or a collection of bl",
        ),
        (
            lambda: plan_move([5, 1], 2, 6, -1, 4, rope=ROPE, writable={1}),
            "block 5 would be written and has more than one reference",
        ),
        (
            lambda: plan_move([5, 1], 2, 6, 0, 4, rope=ROPE, writable={1}),
            "shift is 0 within the same blocks, expected another shift, or `into`",
        ),
        (
            lambda: plan_move([5, 1], 6, 2, 1, 4, rope=ROPE, writable={1}),
            "stop is 2, expected at least start = 6",
        ),
        (
            lambda: plan_move([5, 1], 0, 6, -1, 4, rope=ROPE, writable={1, 5}),
            "blocks are asked for positions -1 to 4, expected within",
        ),
        (
            lambda: approx_plan_drop([5, 1], 3, 3, 8, 4, rope=ROPE, writable={1, 5}),
            "start, stop and length are 3, 3 and 8, expected 0 <= start < stop <= length",
        ),
        (
            lambda: plan_compact(np.array([1, 0]), 4, writable={1}),
            r"live is int64 of shape \(2,\), expected bool \(NB,\)",
        ),
        (lambda: MoveCounts(0), "blocks is 0 and limit 2, expected at least 1"),
    ],
)
def test_builders(call, message):
    refused(call, message)


def config(**settings: object) -> SimpleNamespace:
    given = {"rope_theta": 1e4, "hidden_size": 64, "num_attention_heads": 4}
    return SimpleNamespace(**given | settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rope(()), r"tables of lengths \[\], expected one length R/2 >= 1"),
        (lambda: Rope(((1.0,), (1.0, 2.0))), r"lengths \[1, 2\], expected one length"),
        (lambda: Rope(((float("nan"),),)), "not all finite, expected radians per position"),
        (lambda: Rope(((1.0,),), (0, 1)), "layer 1 has table 1, expected below 1, or -1 for none"),
        *[
            (
                lambda found=found: Rope.from_config(config(**found), interleaved=False),
                message,
            )
            for found, message in (
                (
                    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
                    "rope_type is 'dynamic', expected one of default, linear, llama3, yarn",
                ),
                ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope', expected one"),
                (
                    {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                    r"mrope_section \(M-RoPE\): a token has three positions there, expected one",
                ),
                (
                    {"layer_types": ["full_attention", "sliding_attention"]},
                    r"\['full_attention', 'sliding_attention'\] .*, expected full attention: a tok",
                ),
                ({"sliding_window": 4096}, "sliding_window is 4096, expected full attention"),
                (
                    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
                    r"by kind of layer, .*, expected one for all; give Rope the tables",
                ),
                ({"rope_theta": None}, "expected a rope_theta: the model has no rotary positions"),
            )
        ],
    ],
)
def test_ropes(call, message):
    refused(call, message)


def test_a_window_that_is_off_is_none():
    off = config(sliding_window=4096, use_sliding_window=False)
    assert Rope.from_config(off, interleaved=False).width == 16


def turned(rope: Rope) -> SplicePlan:
    return SplicePlan(rows([0, 4, 1, 0]), 4, rope=rope, rotations=rope.rotations(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda view: splice(view, plan_fork([1], [2], 3, 8)),
            "the cache that is read has blocks of 4 tokens, expected the plan's 8",
        ),
        (
            lambda view: splice(view, plan_fork([1], [9], 3, 4)),
            "slot 36 is written, expected below 32, the slots of 8 blocks",
        ),
        (
            lambda view: splice(view, plan_fork([9], [1], 3, 4)),
            "slot 36 is read, expected below 32, the slots of 8 blocks",
        ),
        (
            lambda view: splice(view, turned(Rope((tuple([1.0] * 5),)))),
            "the rope turns 10 numbers of a key, expected at most its 8",
        ),
        (
            lambda view: splice(view, turned(Rope(((1.0,),), (0, 0, 0)))),
            "the rope is of 3 layers, expected the cache's 2",
        ),
        (
            lambda view: splice(view, plan_fork([1], [2], 3, 4), source=view),
            "source shares memory with the view, expected another cache, or None for the view",
        ),
        (
            lambda view: splice(view, plan_fork([1], [2], 3, 4), source=KVView.stacked(kv(3))),
            r"source has \(L, H, .*\) \(3, 2, .*, expected \(2, 2, .* like the view",
        ),
        (
            lambda view: splice(view, plan_fork([1], [2], 3, 4), impl="cuda"),
            "impl is 'cuda', expected 'auto', 'triton' or 'reference'",
        ),
        (
            lambda _: splice(
                KVView.stacked(kv(dtype=torch.float64)), plan_fork([1], [2], 3, 4), impl="triton"
            ),
            "impl='triton' got torch.float64, expected float32, bfloat16 or float16",
        ),
        (
            lambda view: splice(view, plan_fork([1], [2], 3, 4), impl="triton"),
            r"impl='triton' got a cache on cpu, expected CUDA \(or TRITON_INTERPRET=1",
        ),
    ],
)
def test_splices(call, message):
    refused(lambda: call(KVView.stacked(kv())), message)


@pytest.mark.parametrize(
    "plan",
    [
        # A chain of forks: which of the two comes first?
        plan_fork([5], [0], 3, 4) + plan_fork([0], [1], 2, 4),
        # To the right, over what is still to be read.
        plan_move([5, 1], 0, 6, 1, 4, rope=ROPE, writable={1, 5}),
        # To the left, but lanes have no order among themselves.
        SplicePlan(rows([4, 0, 4, -1], [8, 4, 4, -1]), 4),
        # To the left, in one lane, the wrong way round.
        SplicePlan(rows([8, 4, 4, -1], [4, 0, 4, -1]), 4, lanes=np.array([0, 2], np.int32)),
        # Two moves that are safe apart: one writes what the other reads.
        plan_move([5, 1], 4, 8, -4, 4, rope=ROPE, writable={5})
        + plan_move([5, 2], 0, 4, 4, 4, rope=ROPE, writable={2}),
    ],
)
def test_a_slot_that_might_be_written_before_it_is_read(plan):
    before = torch.randn(kv().shape)
    cache = before.clone()
    message = r"segment \d reads slots \d+ to \d+, which segment \d may write before that"
    refused(lambda: splice(KVView.stacked(cache), plan), message)
    assert torch.equal(cache, before)
