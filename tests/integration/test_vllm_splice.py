"""The KV connector inside a real vLLM, on the CPU: nothing computed twice, nothing changed by it.

Every claim is a count of prefilled tokens (vLLM's own), and an output equal to that of a cold run.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio
import torch

from thor_fast.engines import vllm_start
from thor_fast.engines.base import FinishReason, GenerateRequest, KVBudget, SamplingParams
from thor_fast.engines.tail_copies import TailCopy
from thor_fast.engines.vllm import VLLMEngine
from thor_fast.errors import EngineError

from .vllm_model import (
    BLOCK,
    LOGPROB_TOLERANCE,
    MAX_CONTEXT,
    PROMPT,
    build_model,
    generate,
    greedy,
    needs_vllm,
    prompt,
    truth,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]

N_SEQUENCES = 8
# Five full contexts and some: eight sequences that grow to the end push each other out.
POOL_BLOCKS = 46
# The same tokens computed in other batch shapes; measured: 0 to 2e-6.
COLD_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(vllm_environment, model, folder):
    """It pauses at the fifth token it says to ``PROMPT``."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    block_bytes = config.num_hidden_layers * 2 * heads * dim * 4 * BLOCK
    engine = VLLMEngine.from_pretrained(
        folder,
        max_sequences=N_SEQUENCES,
        max_context=MAX_CONTEXT,
        splice_kv=True,
        pause_token_ids=frozenset(greedy(model, PROMPT, 5)[-1:]),
        enforce_eager=True,
        block_size=BLOCK,
        kv_cache_memory_bytes=POOL_BLOCKS * block_bytes,
    )
    yield engine
    await engine.aclose()


async def cold(engine, ids, n):
    """What the same vLLM says with nothing cached. Drops all pins."""
    await nothing_held(engine)
    tokens, logprobs, _, prefill = await generate(engine, ids, n, session="cold", temperature=0.0)
    assert prefill == len(ids)
    await engine.release("cold")
    return tokens, logprobs


async def nothing_held(engine) -> None:
    """Dropping the pins leaves no block behind: only then can vLLM reset its cache."""
    async with asyncio.timeout(30):
        while not await engine._llm.reset_prefix_cache(reset_connector=True):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def equal(got, expected) -> None:
    tokens, logprobs = got
    assert tokens == expected[0]
    np.testing.assert_allclose(logprobs, expected[1], atol=COLD_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("version", "settings", "message"),
    [
        ("0.31.2", {}, "vLLM is 0.31.2, expected 0.32 or 0.33 for splice_kv"),
        ("0.33.0", {"data_parallel_size": 2}, "data_parallel_size is 2, expected 1 for splice_kv"),
        ("0.32.0", {"speculative_config": {}}, "speculative_config is set, expected None for"),
    ],
)
def test_where_the_connector_cannot_work(monkeypatch, version, settings, message) -> None:
    monkeypatch.setattr(vllm_start, "import_vllm", lambda _: SimpleNamespace(__version__=version))
    with pytest.raises(EngineError, match=message):
        vllm_start.splicing(settings)


@needs_vllm
async def test_many_turns_compute_what_is_new(engine, model) -> None:
    assert engine.capabilities.native_fork
    assert engine.capabilities.native_truncate
    pool = (POOL_BLOCKS - 1) * BLOCK
    assert engine.kv_budget == KVBudget(N_SEQUENCES, pool, 0, 0, BLOCK)
    context = prompt(45, 2)
    n_new = len(context)
    for turn in range(6):
        tokens, logprobs, _, prefill = await generate(engine, context, 17, temperature=0.0)
        assert prefill == n_new
        assert tokens == greedy(model, context, 17)
        expected = truth(model, context + tokens)[len(context) :]
        np.testing.assert_allclose(logprobs, expected, atol=LOGPROB_TOLERANCE, rtol=0)
        observation = prompt(5 + turn, turn)
        context += tokens + observation
        # The observation, and the last sampled token, whose KV has not been computed.
        n_new = len(observation) + 1
    await engine.release("s")


@needs_vllm
async def test_eight_forks_at_an_odd_position_equal_cold_runs(engine) -> None:
    ids = prompt(100, 3)
    tokens, *_ = await generate(engine, ids, 60, session="parent", temperature=0.0)
    at = 141
    assert at % BLOCK
    names = await engine.fork("parent", 8, at)
    await engine.release("parent")  # the children stand on its KV all the same
    branches = [[*ids, *tokens][:at] + prompt(3, 50 + i) for i in range(8)]
    results = await asyncio.gather(
        *(
            generate(engine, branch, 20, session=name, temperature=0.0)
            for name, branch in zip(names, branches, strict=True)
        )
    )
    for name in names:
        await engine.release(name)
    for branch, (got, logprobs, _, prefill) in zip(branches, results, strict=True):
        assert prefill == 3
        equal((got, logprobs), await cold(engine, branch, 20))
    assert len({tuple(tokens) for tokens, *_ in results}) == 8


@needs_vllm
@pytest.mark.parametrize("at", [64, 77, 1])
async def test_a_resume_after_a_rollback_equals_a_cold_run(engine, at) -> None:
    ids = prompt(70, 4)
    tokens, *_ = await generate(engine, ids, 40, session="back", temperature=0.0)
    await engine.truncate("back", at)
    branch = [*ids, *tokens][:at] + prompt(6, 60)
    got, logprobs, _, prefill = await generate(engine, branch, 30, session="back", temperature=0.0)
    assert prefill == 6
    # What the first branch said from there on is still known where it was filed.
    again, *_ = await generate(engine, ids, 40, session="again", temperature=0.0)
    assert again == tokens
    for name in ("back", "again"):
        await engine.release(name)
    equal((got, logprobs), await cold(engine, branch, 30))


@needs_vllm
async def test_a_copied_block_is_filed_only_under_its_own_tokens(engine, model) -> None:
    """Behind the fork the copy holds the parent's KV, until the child's own replaces it."""
    ids = prompt(60, 6)
    await generate(engine, ids, 40, session="parent", temperature=0.0)
    (child,) = await engine.fork("parent", 1, 50)
    branch = [*ids[:50], *prompt(50, 70)]
    got, *_ = await generate(engine, branch, 30, session=child, temperature=0.0)
    assert got == greedy(model, branch, 30)
    for name, context in (("other", branch), ("parents", ids)):
        # From the prefix cache alone, with the child's blocks and with the parent's.
        got, _, _, prefill = await generate(engine, context, 30, session=name, temperature=0.0)
        assert got == greedy(model, context, 30)
        assert prefill == len(context) - (len(context) - 1) // BLOCK * BLOCK
    for name in ("parent", child, "other", "parents"):
        await engine.release(name)


@needs_vllm
async def test_pins_survive_what_goes_through_the_rest_of_the_pool(engine) -> None:
    pool = engine.kv_budget.max_tokens
    ids = prompt(90, 7)
    tokens, *_ = await generate(engine, ids, 20, session="paused", temperature=0.0)
    n_batches, n_junk = 10, 4
    for batch in range(n_batches):
        junk = [f"junk{batch}.{i}" for i in range(n_junk)]
        contexts = [prompt(200, 100 + n_junk * batch + i) for i in range(n_junk)]
        await asyncio.gather(
            *(generate(engine, c, 8, session=n) for c, n in zip(contexts, junk, strict=True))
        )
        for name in junk:
            await engine.release(name)
    assert n_batches * n_junk * 200 > 3 * pool
    branch = [*ids, *tokens, 5]
    _, _, _, prefill = await generate(engine, branch, 5, session="paused")
    assert prefill == 2
    await engine.release("paused")


@needs_vllm
@pytest.mark.parametrize("by_plan", [False, True])
def test_the_workers_half_copies_what_the_schedulers_half_says(monkeypatch, by_plan) -> None:
    """Once by vLLM's helper, whole blocks, and once by our plan, as on a GPU: tokens."""
    from thor_fast.engines import vllm_connector, vllm_copies
    from thor_fast.kernels import KVView

    if by_plan:
        monkeypatch.setattr(vllm_copies, "KVView", SimpleNamespace(vllm=KVView.packed_layers))
    layers = {f"layer{i}": torch.rand(6, 2, 8, 8) for i in range(3)}
    before = {name: layer.clone() for name, layer in layers.items()}
    connector = object.__new__(vllm_connector.SplicingKVConnector)
    connector._kv_cache_config = SimpleNamespace(num_blocks=6)
    connector._spec = SimpleNamespace(head_size=4)
    connector.register_kv_caches(layers)
    copies = [TailCopy(0, 3, 8), TailCopy(1, 4, 5)]
    connector.bind_connector_metadata(vllm_connector._Copies(copies))
    connector.start_load_kv(None)
    for name, layer in layers.items():
        expected = before[name]
        expected[3] = expected[0]
        n_tokens = 5 if by_plan else 8
        expected[4, :, :n_tokens] = expected[1, :, :n_tokens]
        assert torch.equal(layer, expected)


@needs_vllm
async def test_in_a_pool_full_of_pins_each_goes_on_from_its_own(engine, model) -> None:
    """No block is free for a copy: who resumes gives up its own last block, and nobody else any."""
    await nothing_held(engine)
    per_session = 5
    names = [f"full{i}" for i in range((POOL_BLOCKS - 1) // per_session)]
    assert per_session * len(names) == POOL_BLOCKS - 1
    length = (per_session - 1) * BLOCK + BLOCK // 2
    contexts = [prompt(length - 5, 500 + i) for i in range(len(names))]
    for name, context in zip(names, contexts, strict=True):
        tokens, *_ = await generate(engine, context, 5, session=name, temperature=0.0)
        context += tokens
    for name, context in zip(names, contexts, strict=True):
        got, _, _, prefill = await generate(engine, context, 5, session=name, temperature=0.0)
        assert got == greedy(model, context, 5)
        assert prefill <= BLOCK // 2
    for name in names:
        await engine.release(name)


@needs_vllm
async def test_pins_give_way_to_whatever_runs(engine, model) -> None:
    """More sessions than the pool holds, none released; then as many full contexts as fit."""
    names = [f"idle{i}" for i in range(3 * N_SEQUENCES)]
    contexts = [prompt(150, 200 + i) for i in range(len(names))]
    await asyncio.gather(
        *(generate(engine, c, 20, session=n) for c, n in zip(contexts, names, strict=True))
    )
    assert engine.kv_budget.live_tokens > engine.kv_budget.max_tokens
    starts = [prompt(40, 300 + i) for i in range(N_SEQUENCES)]
    results = await asyncio.gather(
        *(
            generate(engine, ids, 1000, session=f"long{i}", temperature=0.0)
            for i, ids in enumerate(starts)
        )
    )
    for ids, (tokens, _, finish, _) in zip(starts, results, strict=True):
        assert finish is FinishReason.CONTEXT
        assert tokens == greedy(model, ids, MAX_CONTEXT - len(ids))
    # An evicted one is computed again, and says the same.
    got, _, _, prefill = await generate(engine, contexts[0], 20, session=names[0], temperature=0.0)
    assert prefill > 1
    assert got == greedy(model, contexts[0], 20)
    for name in names + [f"long{i}" for i in range(N_SEQUENCES)]:
        await engine.release(name)


@needs_vllm
async def test_a_pool_too_small_for_all_preempts_and_stays_exact(engine, model) -> None:
    """Twice as many sequences as fit grow to the end, from forks, with pins in the way."""
    ids = prompt(100, 400)
    await generate(engine, ids, 20, session="trunk", temperature=0.0)
    names = await engine.fork("trunk", 2 * N_SEQUENCES, 99)
    branches = [[*ids[:99], 7 + i] for i in range(len(names))]
    results = await asyncio.gather(
        *(
            generate(engine, branch, 1000, session=name, temperature=0.0)
            for name, branch in zip(names, branches, strict=True)
        )
    )
    for branch, (tokens, *_) in zip(branches, results, strict=True):
        assert tokens == greedy(model, branch, MAX_CONTEXT - len(branch))
    for name in ("trunk", *names):
        await engine.release(name)


@needs_vllm
async def test_a_thousand_aborts_leak_no_block(engine) -> None:
    ids = prompt(70, 8)
    await generate(engine, ids, 10, session="base")

    async def abort(i: int) -> None:
        request = GenerateRequest((*ids[: 40 + i % 30], i % 500), names[i % 50], 200)
        async with aclosing(engine.generate(request)) as stream:
            first = asyncio.ensure_future(anext(stream))
            if i % 2:
                await first
            else:  # on its way to vLLM, waiting there, or running
                await asyncio.wait([first], timeout=0.001 * (i % 7))
                first.cancel()
                await asyncio.wait([first])

    for start in range(0, 1000, 50):
        names = await engine.fork("base", 50, 33)
        await asyncio.gather(*(abort(i) for i in range(start, start + 50)))
        for name in names:
            await engine.release(name)
    assert engine._llm.get_num_unfinished_requests() == 0
    _, _, _, prefill = await generate(engine, [*ids, 9], 10, session="base")
    assert prefill == 1
    await engine.release("base")
    await nothing_held(engine)


@needs_vllm
async def test_a_pause_waits_and_goes_on(engine, model) -> None:
    free = greedy(model, PROMPT, 40)
    request = GenerateRequest(tuple(PROMPT), "pausing", 40, sampling=SamplingParams(0.0))
    async with aclosing(engine.generate(request)) as stream:
        tokens: list[int] = []
        while len(tokens) < 5:
            chunk = await anext(stream)
            tokens += chunk.token_ids
        assert (tokens, chunk.finish) == (free[:5], None)
        # Not one token more was sampled, and nothing runs.
        assert engine._llm.get_num_unfinished_requests() == 0
        rest = [chunk async for chunk in stream]
    assert tokens + [t for chunk in rest for t in chunk.token_ids] == free
    assert rest[-1].finish is FinishReason.LENGTH
    # At a pause that is the last token allowed, and at one that is the caller's own stop.
    got = await generate(engine, PROMPT, 5, session="pausing", temperature=0.0)
    assert (got[0], got[2]) == (free[:5], FinishReason.LENGTH)
    got = await generate(engine, PROMPT, 9, session="pausing", stop=free[4:5], temperature=0.0)
    assert (got[0], got[2]) == (free[:5], FinishReason.STOP)
    await engine.release("pausing")


@needs_vllm
async def test_a_session_released_at_a_pause_does_not_go_on(engine) -> None:
    request = GenerateRequest(tuple(PROMPT), "doomed", 40, sampling=SamplingParams(0.0))
    async with aclosing(engine.generate(request)) as stream:
        n_tokens = 0
        while n_tokens < 5:
            n_tokens += len((await anext(stream)).token_ids)
        await engine.release("doomed")
        with pytest.raises(EngineError, match="'doomed' was released while it was generating"):
            await anext(stream)


@needs_vllm
async def test_new_weights_drop_every_pin(engine, model, folder) -> None:
    ids = prompt(70, 9)
    for i in range(N_SEQUENCES):
        await generate(engine, [*ids, i + 4], 5, session=f"old{i}")
    across = asyncio.create_task(generate(engine, ids, 120, session="across"))
    async with asyncio.timeout(60):
        while "across" not in engine._sessions or engine._sessions["across"].length < 75:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    fresh = build_model(seed=1)
    try:
        fresh.save_pretrained(folder)
        await engine.update_weights(1)
        tokens, _, _, prefill = await generate(
            engine, [*ids, 4], 30, session="old0", temperature=0.0
        )
        assert prefill == 71
        assert tokens == greedy(fresh, [*ids, 4], 30)
        tokens, *_ = await across
        # What went on across the update ended in KV of the old salt: nobody starts from it.
        branch = [*ids, *tokens, 9]
        got, _, _, prefill = await generate(engine, branch, 9, session="across", temperature=0.0)
        assert prefill == len(branch) - 64
        assert got == greedy(fresh, branch, 9)
    finally:
        model.save_pretrained(folder)
        await engine.update_weights(2)
