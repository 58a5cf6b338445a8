"""Decode steps of fixed shapes, and their replay, give what steps of fitted shapes give.

What captures here is a tape of the operations, see tape.py; CUDA graphs are in
tests/unit/test_decode_graphs_gpu.py.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines import paged
from thor_fast.engines.decode_attention import GATHER, AttentionKind
from thor_fast.engines.decode_graph import DecodeGraphs, decode_graphs
from thor_fast.engines.fused_model import fuse
from thor_fast.engines.model_twin import forward, probe, shadow
from thor_fast.engines.paged_attention import Chunk, KVPool, PagedStep
from thor_fast.engines.static_step import StaticStep

from .tape import Tape

SIZE, WIDTH, BLOCKS = 8, 8, 96
# Other summation orders in attention, as in test_exactness.py.
LOGIT_TOLERANCE = 1e-4
FAMILIES = ["qwen3", "qwen2", "llama"]


class World:
    """A model, a pool of blocks in no order, and texts whose first tokens have their KV there."""

    def __init__(self, model: Any, lengths: list[int], *, seed: int = 0) -> None:
        self.model, self.twin = model, shadow(model)
        self.heads = probe(self.twin)
        self.run = partial(forward, self.twin)
        self.pool = KVPool(BLOCKS, SIZE, model.config.num_hidden_layers, self.heads.keys)
        # Not zeros: the padding token's KV are, in these models, and would not show.
        self.pool._kv.normal_(generator=torch.Generator().manual_seed(seed))
        rng = np.random.default_rng(seed)
        order = iter(rng.permutation(BLOCKS).tolist())
        self.texts = [rng.integers(0, 61, n).tolist() for n in lengths]
        self.blocks = [list(itertools.islice(order, -(-n // SIZE))) for n in lengths]
        for text, blocks in zip(self.texts, self.blocks, strict=True):
            if len(text) > 1:
                self.run(PagedStep(self.pool, [Chunk(blocks, 0, text[:-1])]))

    def chunks(self, names: Any = None, back: int = 1) -> list[Chunk]:
        """The token ``back`` from the end of each text; of all, the longest first."""
        names = range(len(self.texts)) if names is None else names
        chunks = [
            Chunk(self.blocks[n], len(self.texts[n]) - back, self.texts[n][-back:][:1])
            for n in names
        ]
        return sorted(chunks, key=lambda c: -c.start)

    def static(self, rows: int, width: int = WIDTH) -> StaticStep:
        return StaticStep(self.pool, rows, width, GATHER.build(self.pool, rows, width))

    def truth(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits by the untouched model, of one text at a time."""
        rows = []
        for chunk in chunks:
            text = self.texts[self.blocks.index(list(chunk.blocks))]
            rows.append(self.model(torch.tensor([text[: chunk.start + 1]])).logits[0, -1])
        return torch.stack(rows)

    def graphs(self, kind: AttentionKind = GATHER, capture: Any = Tape.capture) -> DecodeGraphs:
        return DecodeGraphs(self.pool, kind, lambda: capture, max_rows=6, max_blocks=WIDTH)


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def no_captures() -> None:
    Tape.captured = Tape.played = 0


ragged = st.lists(st.integers(1, SIZE * WIDTH), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(lengths=ragged, spare=st.integers(0, 5), family=st.sampled_from(FAMILIES))
def test_padded_rows_change_neither_logits_nor_the_kv_of_others(
    models: Any, lengths: list[int], spare: int, family: str
) -> None:
    with torch.inference_mode():
        world = World(models[family], lengths)
        chunks = world.chunks()
        expected = world.run(PagedStep(world.pool, chunks))
        kept = world.pool._kv.clone()
        # What the step itself writes is another rounding of the same numbers.
        for chunk in chunks:
            kept[:, :, chunk.blocks[chunk.start // SIZE], chunk.start % SIZE] = 0
        kept[:, :, world.pool.scratch] = 0
        step = world.static(len(chunks) + spare)
        step.fill(chunks)
        logits = world.run(step)[: len(chunks)]
        torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)
        torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
        written = world.pool._kv.clone()
        for chunk in chunks:
            written[:, :, chunk.blocks[chunk.start // SIZE], chunk.start % SIZE] = 0
        written[:, :, world.pool.scratch] = 0
        assert torch.equal(written, kept)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=2, max_size=6))
def test_refilling_leaves_nothing_of_the_step_before(models: Any, steps: list[set[int]]) -> None:
    with torch.inference_mode():
        world = World(models["qwen3"], [3, 64, 17, 8, 9, 40])
        refilled = world.static(6)
        for names in steps:
            fresh = world.static(6)
            chunks = world.chunks(names)
            fresh.fill(chunks)
            expected = world.run(fresh)
            refilled.fill(chunks)
            assert torch.equal(world.run(refilled), expected)


@pytest.mark.usefixtures("inference")
def test_what_is_not_finite_elsewhere_reaches_no_row(models: Any) -> None:
    world = World(models["qwen3"], [3, 30])
    chunks = world.chunks()
    expected = world.truth(chunks)
    mine = {block for blocks in world.blocks for block in blocks}
    for block in set(range(BLOCKS + 1)) - mine:
        world.pool._kv[:, :, block] = float("nan")
    step = world.static(4)
    step.fill(chunks)
    torch.testing.assert_close(world.run(step)[:2], expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_of_a_few_captures_serve_every_step(models: Any, family: str, fused: bool) -> None:
    world = World(models[family], [30, 64, 17, 29, 40, 25])
    if fused:
        faster = fuse(world.twin)
        assert faster is not None
        world.run = faster.forward
    graphs = world.graphs()
    for names in ([0, 1, 2, 3, 4, 5], [2], [0, 1, 2, 3, 4], [3, 0], [5, 3], [0, 2, 3, 4], [1, 4]):
        for back in (9, 8, 1):
            chunks = world.chunks(names, back)
            logits = graphs.logits(world.run, chunks)
            torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
    # Rows 1, 2, 4 and, instead of 8, the most there are; widths 4 and 8, of 1 row 2 and 4.
    assert sorted(graphs._buckets) == [(1, 2), (1, 4), (2, 4), (2, 8), (4, 4), (4, 8), (6, 8)]
    assert Tape.captured == 7
    graphs.drop()
    graphs.logits(world.run, world.chunks([2]))
    assert Tape.captured == 8


@pytest.mark.usefixtures("inference")
def test_attention_that_follows_lengths_has_one_width(models: Any) -> None:
    world = World(models["llama"], [3, 64, 17])
    graphs = world.graphs(AttentionKind("other", GATHER.build, by_width=False))
    for names in ([0], [1], [0, 2], [1, 2]):
        chunks = world.chunks(names)
        logits = graphs.logits(world.run, chunks)
        torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
    assert list(graphs._buckets) == [(1, WIDTH), (2, WIDTH)]


@pytest.mark.usefixtures("inference")
def test_a_model_that_reads_numbers_back_is_run_step_by_step(models: Any) -> None:
    world = World(models["qwen3"], [3, 20])
    graphs = world.graphs()

    def run(step: Any) -> torch.Tensor:
        assert step.position_ids.max().item() < 256
        return world.run(step)

    chunks = world.chunks()
    with pytest.warns(RuntimeWarning, match="without CUDA graphs, which failed: RuntimeError: op"):
        logits = graphs.logits(run, chunks)
    torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
    graphs.drop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = graphs.logits(run, world.chunks([1]))
    torch.testing.assert_close(logits, world.truth(world.chunks([1])), atol=LOGIT_TOLERANCE, rtol=0)
    assert Tape.captured == 1


@pytest.mark.usefixtures("inference")
def test_a_kernel_that_fails_gives_way_to_the_gather(models: Any) -> None:
    world = World(models["qwen3"], [3, 20])

    def fail(*_: Any) -> Any:
        raise FileNotFoundError("nvcc")

    graphs = world.graphs(AttentionKind("other", fail, by_width=False))
    chunks = world.chunks()
    with pytest.warns(RuntimeWarning, match="without other, which failed: FileNotFoundError: nvcc"):
        logits = graphs.logits(world.run, chunks)
    torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
    assert list(graphs._buckets) == [(2, 4)]


@pytest.mark.usefixtures("inference")
def test_no_graph_of_a_kernel_that_has_failed_is_used_again(models: Any) -> None:
    world = World(models["qwen3"], [64, 60])

    def build(pool: KVPool, rows: int, width: int) -> Any:
        if rows > 1:
            raise MemoryError("workspace")
        return GATHER.build(pool, rows, width)

    graphs = world.graphs(AttentionKind("other", build, by_width=False))
    graphs.logits(world.run, world.chunks([0]))
    assert list(graphs._buckets) == [(1, WIDTH)]
    with pytest.warns(RuntimeWarning, match="without other, which failed: MemoryError: workspace"):
        graphs.logits(world.run, world.chunks())
    assert list(graphs._buckets) == [(2, WIDTH)]
    chunks = world.chunks([0])
    logits = graphs.logits(world.run, chunks)
    torch.testing.assert_close(logits, world.truth(chunks), atol=LOGIT_TOLERANCE, rtol=0)
    assert Tape.captured == 3


@pytest.mark.usefixtures("inference")
def test_there_are_none_on_a_cpu(models: Any) -> None:
    world = World(models["qwen3"], [3])
    assert decode_graphs(world.pool, world.heads, max_rows=4, max_blocks=4) is None


def _on_tape(pool: KVPool, heads: Any, *, max_rows: int, max_blocks: int) -> DecodeGraphs:
    capture = lambda: Tape.capture  # noqa: E731
    return DecodeGraphs(pool, GATHER, capture, max_rows=max_rows, max_blocks=max_blocks)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 4}])
async def test_an_engine_with_graphs_is_the_engine_without(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    """Over ragged batches, forks and truncations off block borders, new weights, a small pool."""
    settings: dict[str, Any] = {"max_sequences": 3, "kv_tokens": 160, "initializer_range": 0.27}
    plain = make("qwen3", **settings)
    monkeypatch.setattr(paged, "decode_graphs", _on_tape)
    graphed = make("qwen3", **settings)
    assert graphed.engine._steps._graphs is not None
    results = [await _play(driver, sampling) for driver in (plain, graphed)]
    for (tokens, logprobs), (expected, expected_logprobs) in zip(*results, strict=True):
        assert tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=5e-5)
    assert Tape.played > 3 * Tape.captured > 0


async def _play(driver: Any, sampling: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    engine, known, out = driver.engine, {}, []

    async def extend(ids_of: dict[str, list[int]], n: int) -> None:
        answers = await asyncio.gather(
            *[driver.generate(ids, n, session=s, **sampling) for s, ids in ids_of.items()]
        )
        for (session, ids), (tokens, logprobs, _) in zip(ids_of.items(), answers, strict=True):
            truth = driver.truth(ids + tokens, n, sampling["temperature"])
            np.testing.assert_allclose(logprobs, truth, atol=5e-5)
            known[session] = ids + tokens
            out.append((tokens, logprobs))

    await extend(
        {s: [(7 * i + n) % 61 for i in range(n)] for s, n in zip("abc", (1, 23, 40), strict=True)},
        9,
    )
    for child in await engine.fork("c", 2, 43):
        known[child] = known["c"][:43]
    await engine.truncate("b", 19)
    known["b"] = known["b"][:19]
    await extend({s: [*ids, 5] for s, ids in known.items()}, 7)
    head = driver.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    captured = Tape.captured
    await engine.update_weights(1)
    await extend({s: [*ids, 6, 7] for s, ids in known.items()}, 4)
    assert (Tape.captured > captured) == (engine._steps._graphs is not None)
    return out
