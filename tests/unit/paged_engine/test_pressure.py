"""A pool smaller than the demand, and beginnings that many sequences share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from thor_fast.engines.base import GenerateRequest
from thor_fast.errors import EngineError

Make = Callable[..., Any]
LOGPROB_TOLERANCE = 5e-5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


async def test_calls_that_outgrow_the_pool_are_interrupted_and_lose_nothing(make: Make) -> None:
    driver = make(max_sequences=4, max_context=128, kv_tokens=128)
    ids = [[*PROMPT, i] for i in range(4)]
    alone = [await driver.generate(ids[i], 70, session="alone", seed=i) for i in range(4)]
    await driver.engine.release("alone")
    # 4 times 79 tokens in a pool of 128, over and over.
    together = await asyncio.gather(
        *[driver.generate(ids[i], 70, session=f"s{i}", seed=i) for i in range(4)]
    )
    assert driver.engine.counters.preemptions > 0
    for (tokens, logprobs, _), (expected, _, _), context in zip(together, alone, ids, strict=True):
        assert tokens == expected
        truth = driver.truth(context + tokens, 70)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    # What a call reports is its context, not what was computed again.
    assert max(driver.prefill) <= 9
    assert driver.engine.kv_budget.live_tokens <= 128
    for i in range(4):
        await driver.engine.release(f"s{i}")
    assert driver.engine.kv_budget.live_tokens == 0


async def test_an_interrupted_call_can_be_cancelled_or_released(make: Make) -> None:
    driver = make(max_sequences=3, max_context=128, kv_tokens=128)
    tasks = [asyncio.create_task(driver.generate(PROMPT, 110, session=f"s{i}")) for i in range(3)]
    await driver.until(lambda: driver.engine.counters.preemptions >= 1)
    tasks[2].cancel()
    await driver.engine.release("s1")
    with pytest.raises(asyncio.CancelledError):
        await tasks[2]
    with pytest.raises(EngineError, match="session 's1' was released while"):
        await tasks[1]
    tokens, _, _ = await tasks[0]
    assert len(tokens) == 110


async def test_a_group_prefills_its_prompt_once(make: Make) -> None:
    driver = make(max_sequences=8)
    prompt = [(7 * i) % 61 for i in range(40)]
    results = await asyncio.gather(
        *[driver.generate(prompt, 6, session=f"s{i}", seed=i) for i in range(8)]
    )
    # The others find its two full blocks in the very step that computes them.
    assert sorted(driver.prefill) == [8] * 7 + [40]
    counters = driver.engine.counters
    assert (counters.prefix_tokens, counters.prefill_tokens) == (7 * 32, 40 + 7 * 8)
    for tokens, logprobs, _ in results:
        truth = driver.truth(prompt + tokens, 6)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    # Also after all have gone, and when it is longer than one step's prefill.
    for i in range(8):
        await driver.engine.release(f"s{i}")
    assert driver.engine.kv_budget.live_tokens == 0
    await driver.generate(prompt, 1, session="later")
    assert driver.prefill[-1] == 8


async def test_new_weights_hide_every_old_prefix(make: Make) -> None:
    driver = make("qwen2", initializer_range=0.31)
    prompt = [(5 * i) % 61 for i in range(50)]
    whole = asyncio.create_task(driver.generate(prompt, 70, session="across"))
    await driver.until(lambda: driver.engine.counters.decode_tokens >= 10)
    await driver.engine.update_weights(1)
    tokens, logprobs, _ = await whole
    # The same weights under another version: computed again, and to the same end.
    truth = driver.truth(prompt + tokens, 70)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    counters = driver.engine.counters
    assert counters.prefill_tokens >= 50 + 60
    assert (counters.prefix_tokens, counters.preemptions) == (0, 0)
    await driver.generate(prompt, 1, session="second")
    assert driver.engine.counters.prefix_tokens == 48
    await driver.engine.update_weights(2)
    await driver.generate(prompt, 1, session="third")
    assert driver.engine.counters.prefix_tokens == 48


@pytest.mark.parametrize(
    ("kv_tokens", "order"), [(112, ["n0", "old", "n1"]), (256, ["n0", "n1", "old"])]
)
async def test_a_resumed_session_goes_before_new_ones_where_blocks_may_run_short(
    make: Make, kv_tokens: int, order: list[str]
) -> None:
    driver = make(max_sequences=1, max_context=96, kv_tokens=kv_tokens)
    tokens, _, _ = await driver.generate(PROMPT, 3, session="old")
    done: list[str] = []

    async def one(name: str, ids: list[int], n: int) -> None:
        await driver.generate(ids, n, session=name)
        done.append(name)

    new = [asyncio.create_task(one(f"n{i}", PROMPT, 30)) for i in range(2)]
    await driver.until(lambda: driver.engine.counters.calls >= 2)
    await asyncio.gather(*new, one("old", PROMPT + tokens, 2))
    assert done == order
    assert driver.prefill[done.index("old") + 1] == 1
    assert driver.engine.counters.evictions == 0


async def test_a_new_call_waits_for_blocks_of_paused_sessions_until_nothing_runs(
    make: Make,
) -> None:
    driver = make(max_sequences=4, max_context=96, kv_tokens=128)
    long = [(3 * i) % 61 for i in range(60)]
    tokens, _, _ = await driver.generate(long, 3, session="paused")
    order: list[str] = []

    def note(name: str) -> Callable[[int], bool]:
        def watch(token: int) -> bool:
            order.append(name)
            return False

        return watch

    running = asyncio.create_task(
        driver.generate(PROMPT, 50, session="running", watch=note("running"))
    )
    await driver.until(lambda: len(order) >= 2)
    # Of 8 blocks 4 are held and 1 to 4 grow: there are none for 60 tokens and one more.
    await driver.generate(long[::-1], 4, session="new", watch=note("new"))
    await running
    assert order == ["running"] * 50 + ["new"] * 4
    assert driver.engine.counters.evictions == 1
    tokens2, logprobs, _ = await driver.generate(long + tokens, 4, session="paused")
    truth = driver.truth(long + tokens + tokens2, 4)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


async def test_sessions_that_wait_all_at_once_do_not_wait_for_each_other(make: Make) -> None:
    driver = make(max_sequences=4, max_context=64, kv_tokens=64)
    for i in range(4):
        await driver.generate([*PROMPT, i], 7, session=f"s{i}")
    # Each of them holds one of four blocks and needs a second one.
    contexts = [[*PROMPT, i, *PROMPT] for i in range(4)]
    results = await asyncio.gather(
        *[driver.generate(contexts[i], 8, session=f"s{i}") for i in range(4)]
    )
    for context, (tokens, logprobs, _) in zip(contexts, results, strict=True):
        truth = driver.truth(context + tokens, 8)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    assert driver.engine.counters.evictions > 0


async def test_kv_that_is_not_finite_reaches_nobody_else(make: Make) -> None:
    driver = make("llama", max_sequences=2, max_context=32, initializer_range=0.27)
    broken = True

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("nan") if broken else None

    driver.model.model.layers[0].input_layernorm.register_forward_hook(spoil)
    await driver.engine.update_weights(1)  # takes the model as it is now, hook included
    for session in ("a", "b"):
        with pytest.raises(EngineError, match=f"logits of session '{session}' are not finite"):
            await driver.generate([*PROMPT, *PROMPT, 1, 2], 5, session=session)
    broken = False
    # Not even told of new weights: the blocks come back clean.
    for session in ("c", "d"):
        tokens, logprobs, _ = await driver.generate([*PROMPT, *PROMPT, 1, 2], 9, session=session)
        truth = driver.truth([*PROMPT, *PROMPT, 1, 2, *tokens], 9)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


async def test_a_parent_may_be_forked_while_it_generates(make: Make) -> None:
    driver = make(max_sequences=4, max_context=128)
    request = GenerateRequest(tuple(PROMPT), "parent", 80)
    stream = driver.engine.generate(request)
    first = list((await anext(stream)).token_ids)
    at = len(PROMPT) + len(first)
    children = await driver.engine.fork("parent", 2, at)
    context = [*PROMPT, *first]
    for child in children:
        tokens, logprobs, _ = await driver.generate(context, 20, session=child, seed=5)
        truth = driver.truth(context + tokens, 20)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    rest = [t async for chunk in stream for t in chunk.token_ids]
    alone, _, _ = await driver.generate(PROMPT, 80, session="alone")
    assert first + rest == alone
    assert driver.prefill[:2] == [1, 1]
