"""What is spliced, and the ways to do it: ours, and what one would write without it.

Legend: L layers, NB blocks, BS tokens of a block, H key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from thor_fast.kernels import KVView, Rope, SplicePlan, plan_fork, plan_move, splice
from thor_fast.kernels.paged_kv_splice_reference import turn

__all__ = ["CASES", "LAYOUTS", "WAYS", "Cache", "Case", "Shape", "check", "make_cases", "ways_of"]

LAYOUTS = ("LBNHC", "BLNHC")
CASES = {
    "fork": "the tail of one sequence to 16 children: half a block each",
    "copy": "whole blocks to others, as they are",
    "move": "a suffix to other blocks 20 positions to the left, keys turned",
    "slide": "the same within its own blocks",
    "turn": "keys turned where they are, values stay",
}
WAYS = {
    "thor_fast": "splice: one launch for all layers (on a CPU its twin in torch)",
    "per-layer": "index copies of the tokens, two per layer; indices and angles made before",
    "blocks": "index_select and index_copy_ of whole blocks: one pair of calls per layer, or one "
    "for all where blocks come first; turns nothing",
    "re-prefill": "the model's forward of these tokens, without the context before them: less "
    "than it would be",
}
CHILDREN = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model whose cache it is."""

    layers: int
    heads: int  # that attend; half as many have keys and values
    width: int
    hidden: int
    intermediate: int
    block_size: int

    @property
    def kv_heads(self) -> int:
        """H."""
        return self.heads // 2

    def config(self) -> Qwen3Config:
        """A vocabulary of 1000: a head of logits is no part of a cache."""
        return Qwen3Config(
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            vocab_size=1000,
        )


class Cache:
    """A pool in one of vLLM's layouts, filled with random numbers."""

    def __init__(self, shape: Shape, blocks: int, layout: str, device: torch.device) -> None:
        self.shape, self.layout = shape, layout
        sizes = {"L": shape.layers, "B": blocks, "N": shape.block_size, "H": shape.kv_heads}
        sizes["C"] = 2 * shape.width
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.storage = torch.randn([sizes[name] for name in layout], device=device, dtype=dtype)
        logical = self.storage.permute(*(layout.index(name) for name in "LBHNC"))
        self.view = KVView.packed_layers(list(logical), shape.width)


@dataclass(frozen=True, slots=True)
class Case:
    """``moved_bytes``: read and written by a way that wastes nothing."""

    name: str
    plan: SplicePlan
    moved_bytes: int


def make_cases(cache: Cache, tokens: int, rope: Rope) -> list[Case]:
    """Of ``tokens`` each, in the lower half of the pool, with free blocks in its upper half."""
    size, blocks = cache.view.block_size, cache.view.blocks
    gen = np.random.default_rng(0)
    lower, upper = (
        gen.permutation(blocks // 2) + start for start in (0, blocks // 2)
    )  # as blocks lie after hours of traffic
    every = np.ones(blocks, np.bool_)
    whole = -(-tokens // size)
    length = 20 + tokens
    moves = {"rope": rope, "writable": every}
    ahead = [*[0] * 2, *lower[:whole]]
    plans = {
        "fork": plan_fork(lower[:2], upper[:CHILDREN], size + size // 2, size),
        "copy": plan_move(lower, 0, tokens, 0, size, into=upper, **moves),
        "move": plan_move(lower, 20, length, -20, size, into=upper, **moves),
        "slide": plan_move(lower, 20, length, -20, size, **moves),
        "turn": plan_move(lower, 0, tokens, 2 * size, size, into=ahead, **moves),
    }
    found = []
    for name, plan in plans.items():
        share = 0.5 if name == "turn" else 1.0
        moved = 2 * plan.tokens * cache.view.bytes_per_token * share
        found.append(Case(name, plan, int(moved)))
    return found


def ways_of(
    case: Case, cache: Cache, model: Qwen3ForCausalLM
) -> Mapping[str, Callable[[], object] | str]:
    """By name; text where a way cannot do it."""
    turns = case.plan.rotates
    return {
        "thor_fast": lambda: splice(cache.view, case.plan),
        "per-layer": _per_layer(case, cache),
        "blocks": "turns no keys" if turns else _blocks(case, cache),
        "re-prefill": _prefill(case, model),
    }


def _slots(case: Case, column: int) -> np.ndarray:
    starts, tokens = case.plan.segments[:, column], case.plan.segments[:, 2]
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    slots: np.ndarray = np.repeat(starts, tokens) + within
    return slots


def _places(case: Case, column: int, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    slots = torch.from_numpy(_slots(case, column)).to(cache.view.device)
    return slots // cache.view.block_size, slots % cache.view.block_size


def _per_layer(case: Case, cache: Cache) -> Callable[[], object]:
    read, written = (_places(case, column, cache) for column in (0, 1))
    rotation = None
    if case.plan.rotates:
        rotation = torch.from_numpy(case.plan.rotations[0]).to(cache.view.device)
    stays = case.name == "turn"

    def run() -> None:
        for keys, values in zip(cache.view.keys, cache.view.values, strict=True):
            taken = keys[read]
            keys[written] = taken if rotation is None else turn(taken, rotation, interleaved=False)
            if not stays:
                values[written] = values[read]

    return run


def _blocks(case: Case, cache: Cache) -> Callable[[], object]:
    size = cache.view.block_size
    device = cache.view.device
    read, written = (
        torch.from_numpy(case.plan.segments[:, column].astype(np.int64) // size).to(device)
        for column in (0, 1)
    )
    pools = [cache.storage] if cache.layout[0] == "B" else list(cache.storage)

    def run() -> None:
        for pool in pools:
            pool.index_copy_(0, written, pool.index_select(0, read))

    return run


def _prefill(case: Case, model: Qwen3ForCausalLM) -> Callable[[], object]:
    rows = CHILDREN if case.name == "fork" else 1
    ids = torch.zeros((rows, case.plan.tokens // rows), dtype=torch.int64, device=model.device)

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def check(case: Case, cache: Cache, way: Callable[[], object]) -> str:
    """What is wrong with the tokens that the plan writes, or nothing; the cache is as before."""
    before = cache.storage.clone()
    places = _places(case, 1, cache)

    def written() -> list[torch.Tensor]:
        kinds = (*cache.view.keys, *cache.view.values)
        return [tensor[places].clone() for tensor in kinds]

    splice(cache.view, case.plan, impl="reference")
    expected = written()
    cache.storage.copy_(before)
    way()
    found = written()
    cache.storage.copy_(before)
    # Both turn in float32 and round: the last bit may differ.
    tolerance = 2 * torch.finfo(before.dtype).eps if case.plan.rotates else 0.0
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(t.abs().max()) for t in expected)
    if not worst <= tolerance * largest:
        return f"wrong: off by {worst:.1e}, expected at most {tolerance * largest:.1e}"
    return ""
