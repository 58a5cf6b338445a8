"""The connector's copies by plan: the bytes of the shared tokens, in every layout vLLM has.

Triton's half is covered by the kernels' tests; here the torch twin stands in for it on a CPU.
"""

from __future__ import annotations

import random

import pytest
import torch

from thor_fast.engines import vllm_copies
from thor_fast.engines.tail_copies import TailCopy, tail_plan
from thor_fast.engines.vllm_copies import copier
from thor_fast.kernels import KVView

LAYERS, BLOCKS, HEADS, WIDTH = 3, 6, 2, 4
BLOCK = 8
# Of vLLM's v1/kv_cache_layout.py, by the order in which its dimensions lie in memory.
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def caches(layout: str, per_block: int, device: str = "cpu") -> list[torch.Tensor]:
    """One [NB * k, H, BS, 2 D] per layer, all different numbers, of one allocation."""
    sizes = {
        "L": LAYERS,
        "B": BLOCKS * per_block,
        "H": HEADS,
        "N": BLOCK // per_block,
        "C": 2 * WIDTH,
    }
    shape = [sizes[dim] for dim in layout]
    pool = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=device)
    return list(pool.view(shape).permute([layout.index(dim) for dim in "LBHNC"]).unbind(0))


def by_token(layers: list[torch.Tensor], per_block: int) -> torch.Tensor:
    """[L, NB, tokens of a scheduler's block, H, 2 D], a copy."""
    stacked = torch.stack([layer.transpose(1, 2) for layer in layers])
    return stacked.reshape(LAYERS, BLOCKS, BLOCK, HEADS, 2 * WIDTH).clone()


def copied(layers: list[torch.Tensor], per_block: int, copies: list[TailCopy]) -> None:
    """Copy; nothing but the shared tokens has changed."""
    expected = by_token(layers, per_block)
    for copy in copies:
        expected[:, copy.target, : copy.tokens] = expected[:, copy.source, : copy.tokens]
    run = copier(layers, BLOCKS, WIDTH)
    assert run is not None
    run(copies)
    assert torch.equal(by_token(layers, per_block), expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """A CPU's tensors in a GPU's layout."""

    class Known(KVView):
        __slots__ = ()
        vllm = KVView.packed_layers

    monkeypatch.setattr(vllm_copies, "KVView", Known)


@pytest.mark.parametrize("per_block", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shared_tokens_are_copied_and_nothing_else(as_on_a_gpu, layout, per_block) -> None:
    layers = caches(layout, per_block)
    copied(layers, per_block, [TailCopy(0, 3, BLOCK), TailCopy(1, 5, 3), TailCopy(1, 2, 7)])
    copied(layers, per_block, [])


def test_layers_that_share_their_kv_are_copied_once(as_on_a_gpu) -> None:
    layers = caches("LBHNC", 1)
    run = copier([*layers, layers[0]], BLOCKS, WIDTH)
    assert run is not None
    run([TailCopy(0, 1, 5)])
    got = by_token(layers, 1)
    assert torch.equal(got[:, 1, :5], got[:, 0, :5])


def test_a_cpu_copies_whole_blocks() -> None:
    assert copier(caches("LBHNC", 1), BLOCKS, WIDTH) is None


@pytest.mark.parametrize(
    "layers",
    [
        [torch.zeros(BLOCKS, HEADS, BLOCK, 2 * WIDTH, dtype=torch.uint8)],
        [torch.zeros(BLOCKS, BLOCK, WIDTH)],
        [torch.zeros(BLOCKS + 1, HEADS, BLOCK, 2 * WIDTH)],
    ],
    ids=["quantised", "latents", "blocks that do not divide"],
)
def test_caches_of_another_form_are_copied_by_the_block(as_on_a_gpu, layers) -> None:
    assert copier(layers, BLOCKS, WIDTH) is None


def test_a_plan_has_a_segment_per_kernel_block() -> None:
    plan = tail_plan([TailCopy(2, 5, 19)], 32, 8)
    assert plan.segments[:, :3].tolist() == [[64, 160, 8], [72, 168, 8], [80, 176, 3]]
    assert not plan.rotates


@pytest.mark.parametrize("tokens", [0, 33])
def test_more_tokens_than_a_block_holds(tokens) -> None:
    with pytest.raises(ValueError, match=f"has {tokens} tokens, expected 1 to 32"):
        tail_plan([TailCopy(0, 1, tokens)], 32, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("per_block", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_the_kernel_copies_the_same_bytes(layout, per_block) -> None:
    layers = caches(layout, per_block, "cuda")
    rng = random.Random(0)
    targets = [1, 3, 5]
    copies = [TailCopy(rng.choice([0, 2, 4]), t, rng.randint(1, BLOCK)) for t in targets]
    copied(layers, per_block, copies)
