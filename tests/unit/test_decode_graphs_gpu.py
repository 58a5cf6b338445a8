"""CUDA graphs and paged kernels of the embedded engine on a GPU, where alone they run.

No fixtures of others and no plugins: benchmarks/gpu_suite.sh runs this where those may be missing.
"""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from thor_fast.engines import paged
from thor_fast.engines.base import GenerateRequest, SamplingParams
from thor_fast.engines.decode_attention import GATHER, choose_attention
from thor_fast.engines.decode_graph import CudaCapture, DecodeGraphs
from thor_fast.engines.model_twin import Heads, forward, probe, shadow
from thor_fast.engines.paged import PagedEngine
from thor_fast.engines.paged_attention import Chunk, KVPool, PagedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
WIDTH, BLOCKS = 8, 64


def build(family: str, dtype: torch.dtype) -> Any:
    """7 query heads to a key head, as Qwen2.5-7B, of a width that FlashInfer knows."""
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=61,
            hidden_size=448,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=7,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=256,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return made.to("cuda", dtype).eval()


def text(n: int) -> list[int]:
    return [(7 * n + 5 * i) % 61 for i in range(n)]


def cached(model: Any, lengths: list[int], size: int) -> tuple[KVPool, Heads, list[list[int]]]:
    """A pool that holds ``text(n)`` for each length, and the blocks of each."""
    twin = shadow(model)
    heads = probe(twin)
    pool = KVPool(BLOCKS, size, 3, heads.keys)
    order = np.random.default_rng(0).permutation(BLOCKS).tolist()
    blocks = [order[WIDTH * i : WIDTH * (i + 1)] for i in range(len(lengths))]
    for n, held in zip(lengths, blocks, strict=True):
        forward(twin, PagedStep(pool, [Chunk(held, 0, text(n))]))
    return pool, heads, blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_replays_give_what_eager_steps_give(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    lengths = [90, 64, 33, 17, 8]
    pool, _, blocks = cached(model, lengths, 16)
    run = partial(forward, shadow(model))
    exact = copy.deepcopy(model).to(torch.float64)
    capture = partial(CudaCapture, pool.device)
    graphs = DecodeGraphs(pool, GATHER, capture, max_rows=6, max_blocks=WIDTH)
    steps = []
    for names in ([0, 1, 2, 3, 4], [2], [0, 2, 3], [4], [1, 3, 4], [0, 1, 2, 3, 4]):
        for back in (5, 1):
            starts = {n: lengths[n] - back for n in names}
            chunks = [Chunk(blocks[n], at, [text(lengths[n])[at]]) for n, at in starts.items()]
            given = [torch.tensor([text(lengths[n])[: at + 1]]).cuda() for n, at in starts.items()]
            truth = torch.cat([exact(ids).logits[:, -1] for ids in given])
            eager, replayed = run(PagedStep(pool, chunks)), graphs.logits(run, chunks)
            steps.append(torch.stack((truth, eager.double(), replayed.double())))
    assert len(graphs._buckets) == 6
    truth, eager, replayed = torch.cat(steps, 1)
    error = float((eager - truth).abs().max())
    # As near the truth as eager steps are, up to the luck of another rounding.
    assert float((replayed - truth).abs().max()) <= 2 * error + 1e-4
    top = truth.topk(2).values
    clear = top[:, 0] - top[:, 1] > 6 * error + 2e-4
    assert bool(clear.any())
    assert torch.equal(replayed.argmax(-1)[clear], eager.argmax(-1)[clear])


@torch.inference_mode()
def test_a_step_that_reads_back_is_not_captured_and_harms_nothing() -> None:
    model = build("qwen3", torch.float32)
    pool, _, blocks = cached(model, [20], 16)
    twin = shadow(model)

    def run(step: Any) -> torch.Tensor:
        assert step.position_ids.max().item() < 256
        return forward(twin, step)

    capture = partial(CudaCapture, pool.device)
    graphs = DecodeGraphs(pool, GATHER, capture, max_rows=4, max_blocks=WIDTH)
    chunks = [Chunk(blocks[0], 19, text(20)[-1:])]
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        logits = graphs.logits(run, chunks)
    expected = model(torch.tensor([text(20)]).cuda()).logits[0, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(graphs.logits(run, chunks), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("module", "size"), [("flashinfer", 16), ("flash_attn", 256)])
@pytest.mark.parametrize("group", [1, 4, 7])
@torch.inference_mode()
def test_paged_kernels_give_what_the_gather_gives(
    module: str, size: int, dtype: torch.dtype, group: int
) -> None:
    """Captured over two layers, then replayed for other lengths and tables."""
    found = pytest.importorskip(module)
    rows, width, scale = 5, 4, 128**-0.5
    like = torch.zeros(1, 2, 1, 128, dtype=dtype, device="cuda")
    pool = KVPool(24, size, 2, like)
    pool._kv.normal_()
    kind = choose_attention(Heads(like, 2 * group, scale), size, {module: found}.get)
    assert kind is not GATHER
    kernel, gather = kind.build(pool, rows, width), GATHER.build(pool, rows, width)
    query = torch.randn(rows, 2 * group, 128, device="cuda").to(dtype)

    def run() -> torch.Tensor:
        return torch.stack([kernel.attend(layer, query, scale) for layer in range(2)])

    replay = None
    order = np.random.default_rng(0)
    for lengths in ([1, size, size + 1, 4 * size, 3 * size - 1], [2 * size, 1, 1, 1, 2]):
        table = np.stack([order.permutation(24)[:width] for _ in range(rows)])
        for attention in (kernel, gather):
            attention.plan(np.array(lengths), table)
        replay = replay or CudaCapture(pool.device)(run)
        expected = torch.stack([gather.attend(layer, query, scale) for layer in range(2)])
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(replay(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_with_graphs_is_the_engine_without(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whatever attention is installed; over forks, truncations and new weights."""
    model = build("qwen3", dtype)
    graphed = PagedEngine(model, max_sequences=3, max_context=128)
    assert graphed._steps._graphs is not None
    monkeypatch.setattr(paged, "decode_graphs", lambda *_, **__: None)
    plain = PagedEngine(model, max_sequences=3, max_context=128)
    results = [asyncio.run(play(engine)) for engine in (graphed, plain)]
    if dtype == torch.float32:
        assert [tokens for tokens, _ in results[0]] == [tokens for tokens, _ in results[1]]
    # In bfloat16 the first tokens that differ are nearly tied: up to there log-probs are near.
    bound = 1e-3 if dtype == torch.float32 else 0.15
    compared = 0
    for (tokens, logprobs), (expected, others) in zip(*results, strict=True):
        n = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
        np.testing.assert_allclose(logprobs[:n], others[:n], atol=bound)
        compared += len(logprobs[:n])
    assert compared >= 20


async def play(engine: PagedEngine) -> list[tuple[list[int], list[float]]]:
    """Greedy, each call after one given context, so that calls do not depend on each other."""

    async def one(session: str, ids: list[int], n: int) -> tuple[list[int], list[float]]:
        request = GenerateRequest(tuple(ids), session, n, sampling=SamplingParams(temperature=0.0))
        chunks = [chunk async for chunk in engine.generate(request)]
        return (
            [t for chunk in chunks for t in chunk.token_ids],
            [p for chunk in chunks for p in chunk.logprobs],
        )

    out = list(await asyncio.gather(*[one(str(n), text(n), 12) for n in (1, 23, 40)]))
    children = await engine.fork("40", 2, 35)
    await engine.truncate("23", 19)
    known = {"23": text(23)[:19], **{child: text(40)[:35] for child in children}}
    out += await asyncio.gather(*[one(s, [*ids, 5], 9) for s, ids in known.items()])
    await engine.update_weights(1)
    out += await asyncio.gather(*[one(s, [*ids, 6, 7], 5) for s, ids in known.items()])
    await engine.aclose()
    return out
