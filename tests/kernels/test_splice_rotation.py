"""KV splicing, tier 2: keys that are turned to other positions are right to rounding.

Legend: L layers, NB blocks, BS tokens of a block, H heads, D head width, R rotated width.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from thor_fast.kernels import KVView, MoveCounts, Rope, SplicePlan, plan_fork, plan_move, splice
from thor_fast.kernels.paged_kv_splice_reference import turn

from .splice_caches import make_cache

BLOCKS, BLOCK_SIZE, WIDTH = 8, 4, 16
SHAPE = (2, BLOCKS, BLOCK_SIZE, 2, WIDTH)
EVERY = range(BLOCKS)
# Half a unit in the last place, relative: what one rounding to the format costs.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn, not truncated": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 2.0,
        "truncate": False,
        "beta_fast": 16,
        "original_max_position_embeddings": 128,
    },
}


def _config(scaling: dict, **others: object) -> LlamaConfig:
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "max_position_embeddings": 256,
        "rope_parameters": dict(scaling),
    }
    return LlamaConfig(**settings | others)


def _exactly_turned(keys: torch.Tensor, rope: Rope, shift: int, table: int = 0) -> torch.Tensor:
    """[..., D] float64, pair by pair in complex numbers."""
    frequencies = torch.tensor(rope.frequencies[table], dtype=torch.float64)
    half = len(frequencies)
    near = keys[..., : 2 * half].double()
    if rope.interleaved:
        pairs = torch.view_as_complex(near.unflatten(-1, (half, 2)).contiguous())
    else:
        pairs = torch.complex(*near.split(half, dim=-1))
    pairs = pairs * torch.polar(torch.ones(half, dtype=torch.float64), frequencies * shift)
    if rope.interleaved:
        near = torch.view_as_real(pairs).flatten(-2)
    else:
        near = torch.cat([pairs.real, pairs.imag], dim=-1)
    return torch.cat([near, keys[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_the_models(name):
    config = _config(SCALINGS[name])
    rope = Rope.from_config(config, interleaved=False)
    if name == "default":
        truth = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    else:
        truth, _ = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](config, "cpu")
    np.testing.assert_allclose(rope.frequencies[0], truth.numpy(), rtol=3e-7)


def test_partial_rotary_and_older_names():
    config = _config(SCALINGS["default"] | {"partial_rotary_factor": 0.5})
    assert Rope.from_config(config, interleaved=False).width == 8

    old = SimpleNamespace(
        hidden_size=64,
        num_attention_heads=4,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        no_rope_layers=[1, 0],
    )
    rope = Rope.from_config(old, interleaved=True)
    assert rope.frequencies[0][0] == 0.5
    assert (rope.width, rope.layers, rope.interleaved) == (16, (0, -1), True)


@pytest.mark.parametrize("name", SCALINGS)
def test_keys_of_a_model_at_other_positions(name):
    """All tokens move together, so that the model's own keys there are the truth, in every layer.

    YaRN's factor of cosine and sine is in both; a turn by the model's tables would square it.
    """
    torch.manual_seed(0)
    config = _config(SCALINGS[name])
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 50, (1, 10))

    def cache(first: int) -> torch.Tensor:
        """[L, 2, NB, BS, H, D] in blocks 0, 1, 2 of 4 tokens each."""
        positions = torch.arange(first, first + 10)[None]
        with torch.inference_mode():
            kept = model(ids, position_ids=positions, use_cache=True).past_key_values
        kv = torch.zeros(2, 2, BLOCKS, BLOCK_SIZE, 2, 16, dtype=torch.float64)
        for layer in range(2):
            for side, tensor in enumerate((kept.layers[layer].keys, kept.layers[layer].values)):
                kv[layer, side].view(-1, 2, 16)[:10] = tensor[0].transpose(0, 1)
        return kv

    rope = Rope.from_config(config, interleaved=False)
    moved, truth = cache(3), cache(23)
    # The same blocks five further on in the table: keys are turned where they are.
    plan = plan_move(
        [0, 1, 2], 0, 10, 20, BLOCK_SIZE, rope=rope, writable=EVERY, into=[9] * 5 + [0, 1, 2]
    )
    values = moved[:, 1].clone()
    splice(KVView.stacked(moved), plan)
    assert torch.equal(moved[:, 1], values)
    # The model computes angles in float32: 23 radians are off by 1e-6 at most.
    torch.testing.assert_close(moved, truth, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ROUNDING, key=str)),
    st.integers(-100_000, 100_000).filter(bool),
    st.booleans(),
    st.sampled_from([2, 6, WIDTH]),
)
def test_one_move_costs_one_rounding(dtype, shift, interleaved, width):
    rope = Rope((tuple(1e4 ** -(np.arange(width // 2) / width)),), interleaved=interleaved)
    cache = make_cache("stacked", SHAPE, dtype)
    before = cache.read().clone()
    truth = _exactly_turned(before[:, 0, 2], rope, shift)
    aligned = SplicePlan(
        np.array([[8, 8, 4, 0]], np.int32), BLOCK_SIZE, 0, None, rope, rope.rotations(shift)
    )
    splice(cache.view, aligned)
    found = cache.read()
    # One rounding of the result, and those of cosine, sine and two products in float32, of a pair
    # whose length is the scale: at most 4 of them.
    pair = before[:, 0, 2].double().abs().amax(-1, keepdim=True) * 2**0.5
    bound = ROUNDING[dtype] * truth.abs() + 4 * 2.0**-24 * pair + 1e-7 * (dtype is torch.float16)
    assert ((found[:, 0, 2].double() - truth).abs() <= bound).all()
    assert torch.equal(found[:, 1], before[:, 1])
    others = [block for block in EVERY if block != 2]
    assert torch.equal(found[:, 0, others], before[:, 0, others])


def test_a_suffix_moves_left_within_its_own_blocks():
    cache = make_cache("LHBNC", SHAPE)
    before = cache.read().flatten(2, 3).clone()
    rope = Rope((tuple(1e4 ** -(np.arange(8) / 8)),))
    splice(cache.view, plan_move([5, 1, 6, 0], 6, 15, -5, BLOCK_SIZE, rope=rope, writable=EVERY))
    slots = [b * BLOCK_SIZE + i for b in (5, 1, 6, 0) for i in range(BLOCK_SIZE)]
    after = cache.read().flatten(2, 3)[:, :, slots]
    expected = before[:, :, slots]
    expected[:, 1, 1:10] = expected[:, 1, 6:15].clone()
    expected[:, 0, 1:10] = _exactly_turned(expected[:, 0, 6:15], rope, -5).float()
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    untouched = [slot for slot in range(BLOCKS * BLOCK_SIZE) if slot not in slots]
    assert torch.equal(cache.read().flatten(2, 3)[:, :, untouched], before[:, :, untouched])


def test_layers_have_their_own_tables_or_none():
    tables = ((1.0, 0.1), (0.5, 0.01))
    cache = make_cache("stacked", (3, 2, 4, 2, 8))
    before = cache.read().clone()
    rope = Rope(tables, (1, -1, 0))
    splice(cache.view, plan_move([0], 0, 4, 4, 4, rope=rope, writable={1}, into=[0, 1]))
    for layer, table in enumerate(rope.layers):
        truth = before[layer, 0, 0].double()
        if table >= 0:
            truth = _exactly_turned(before[layer, 0, 0], rope, 4, table)
        torch.testing.assert_close(cache.read()[layer, 0, 1].double(), truth, rtol=1e-6, atol=1e-6)


def test_plans_with_several_rotations_add_up():
    rope = Rope(((1.0, 0.1), (0.5, 0.01)), (1, 0))
    plans = [
        plan_fork([7], [6], 3, BLOCK_SIZE),
        plan_move([0], 0, 3, 1, BLOCK_SIZE, rope=rope, writable={1}, into=[1]),
        plan_move([2], 0, 2, 2, BLOCK_SIZE, rope=rope, writable={3}, into=[3]),
    ]
    together, apart = make_cache("stacked", SHAPE), make_cache("stacked", SHAPE)
    splice(together.view, sum(plans[1:], start=plans[0]))
    for plan in plans:
        splice(apart.view, plan)
    assert torch.equal(together.read(), apart.read())


def test_errors_add_up_and_are_counted():
    """Eight moves of bfloat16 keys cost more than one; the counter stops at its limit."""
    rope = Rope((tuple(1e4 ** -(np.arange(8) / 8)),))
    gen = torch.Generator().manual_seed(0)
    keys = torch.randn(4096, WIDTH, generator=gen).bfloat16()
    errors = {}
    found = keys
    for moves in range(1, 9):
        found = turn(found, torch.from_numpy(rope.rotations(37)), interleaved=False)
        truth = _exactly_turned(keys, rope, 37 * moves)
        errors[moves] = float((found.double() - truth).norm() / truth.norm())
    assert errors[1] < 1.8e-3
    # At least with the square root of their number, if roundings are independent; faster where a
    # slow pair hardly turns and is rounded the same way again.
    assert 2.2 < errors[8] / errors[1] < 6.0

    counts = MoveCounts(BLOCKS, limit=2)
    turned = plan_move([3], 0, 4, 1, 4, rope=rope, writable={4, 5}, into=[4, 5])
    counts.record(turned)
    assert counts.counts.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    counts.record(plan_move([4], 1, 4, -1, 4, rope=rope, writable={4}))
    counts.record(plan_fork([4], [6], 3, 4))  # a copy is as old as its source
    assert counts.counts.tolist() == [0, 0, 0, 0, 2, 1, 2, 0]
    with pytest.raises(ValueError, match=r"keys of block 6 would be turned for the 3\. time"):
        counts.record(plan_move([6], 1, 3, -1, 4, rope=rope, writable={6}))
    counts.reset([6])
    assert counts.counts.tolist() == [0, 0, 0, 0, 2, 1, 0, 0]
