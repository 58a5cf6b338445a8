"""KV splicing, tier 3: dropping text that later tokens attended to is not what a prefill gives."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from thor_fast.kernels import KVView, Rope, approx_plan_drop, plan_fork, plan_truncate, splice

BLOCK_SIZE, BLOCKS = 4, 6
LENGTH, GAP = 15, slice(5, 9)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=3,
        vocab_size=50,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double().eval()


def _sequence(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """[L, 2, T, H, D], by prefill."""
    with torch.inference_mode():
        kept = model(torch.tensor([ids]), use_cache=True).past_key_values
    return torch.stack(
        [torch.stack([y[0].transpose(0, 1) for y in (x.keys, x.values)]) for x in kept.layers]
    )


def _paged(model: LlamaForCausalLM, ids: list[int], blocks: list[int]) -> torch.Tensor:
    kv = torch.zeros(3, 2, BLOCKS, BLOCK_SIZE, 2, 16, dtype=torch.float64)
    dense = _sequence(model, ids)
    for position in range(len(ids)):
        at = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
        kv[:, :, at[0], at[1]] = dense[:, :, position]
    return kv


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_first_layer_is_right_and_the_others_are_not(model, elsewhere):
    ids = [(7 * i + 3) % 50 for i in range(LENGTH)]
    blocks = [3, 0, 5, 1]
    kv = _paged(model, ids, blocks)
    rope = Rope.from_config(model.config, interleaved=False)
    plan = approx_plan_drop(
        blocks,
        GAP.start,
        GAP.stop,
        LENGTH,
        BLOCK_SIZE,
        rope=rope,
        writable={0, 5} | ({2, 4} if elsewhere else set()),
        into=[3, 2, 4] if elsewhere else None,
    )
    if elsewhere:
        plan += plan_truncate(blocks, GAP.start, BLOCK_SIZE, writable=(), fresh=2)
    splice(KVView.stacked(kv), plan, approximate=True)
    table = [3, 2, 4] if elsewhere else [3, 0, 5]
    shorter = ids[: GAP.start] + ids[GAP.stop :]
    found = kv[:, :, table].flatten(2, 3)[:, :, : len(shorter)]
    truth = _sequence(model, shorter)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, :, : GAP.start], truth[:, :, : GAP.start])
    beyond = (found - truth)[1:, :, GAP.start :].norm() / truth[1:, :, GAP.start :].norm()
    assert beyond > 0.05


def test_it_runs_only_when_told_to(model):
    kv = torch.zeros(1, 2, 4, 4, 2, 16)
    rope = Rope.from_config(model.config, interleaved=False)
    plan = approx_plan_drop([0, 1], 1, 2, 8, 4, rope=rope, writable={0, 1})
    for each in (plan, plan + plan_fork([2], [3], 1, 4), plan_fork([2], [3], 1, 4) + plan):
        with pytest.raises(ValueError, match=r"the plan is approximate.*expected approximate=True"):
            splice(KVView.stacked(kv), each)


def test_dropping_the_end_is_a_truncation():
    rope = Rope(((1.0,),))
    assert len(approx_plan_drop([0, 1], 5, 8, 8, 4, rope=rope, writable=())) == 0
