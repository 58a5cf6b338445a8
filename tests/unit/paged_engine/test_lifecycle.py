"""Endings, cancellation, errors: no stream hangs and no block leaks."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thor_fast.engines.base import Engine, FinishReason, GenerateRequest, SamplingParams
from thor_fast.engines.paged import PagedEngine
from thor_fast.errors import EngineError

Make = Callable[..., Any]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


async def settle(engine: PagedEngine, sequences: int, tokens: int | None = None) -> None:
    """Wait until the engine's thread has seen what was sent to it."""
    await engine.release("nobody")
    budget = engine.kv_budget
    assert budget.live_sequences == sequences
    if tokens is not None:
        assert budget.live_tokens == tokens


async def test_it_is_an_engine_and_says_what_it_holds(make: Make) -> None:
    driver = make(max_sequences=4, max_context=128)
    engine = driver.engine
    assert isinstance(engine, Engine)
    assert engine.capabilities.max_context == 128
    assert engine.capabilities.watch
    assert engine.capabilities.native_fork
    assert engine.capabilities.native_truncate
    await driver.generate(PROMPT, 5)
    budget = engine.kv_budget
    # Four run at a time; as many as there are blocks may pause.
    assert (budget.max_sequences, budget.max_tokens, budget.block_tokens) == (32, 512, 16)
    # Whole blocks count: 12 tokens (the last one was sampled, but never fed back) take one.
    assert (budget.live_sequences, budget.live_tokens) == (1, 16)
    counters = engine.counters
    assert (counters.calls, counters.prefill_tokens, counters.decode_tokens) == (1, 8, 5)
    assert counters.steps == 5


async def test_stop_token_ends_the_call_and_is_its_last_token(make: Make) -> None:
    driver = make()
    free, _, _ = await driver.generate(PROMPT, 20, session="free", seed=2)
    stop = free[7]
    first = free.index(stop)
    tokens, logprobs, finish = await driver.generate(PROMPT, 20, seed=2, stop=frozenset({stop}))
    assert finish is FinishReason.STOP
    assert tokens == free[: first + 1]
    assert len(logprobs) == first + 1


async def test_watch_sees_every_token_in_order_and_nothing_is_sampled_past_it(make: Make) -> None:
    driver = make()
    free, _, _ = await driver.generate(PROMPT, 30, session="free", seed=2)
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) == 19

    before = driver.engine.counters.decode_tokens
    tokens, _, finish = await driver.generate(PROMPT, 30, seed=2, watch=watch)
    assert finish is FinishReason.WATCH
    assert tokens == seen == free[:19]
    assert driver.engine.counters.decode_tokens - before == 19
    # The sequence goes on from there as if nothing had happened.
    rest, _, _ = await driver.generate(PROMPT + tokens, 11, seed=2)
    assert tokens + rest == free


async def test_context_end(make: Make) -> None:
    driver = make(max_context=32)
    tokens, _, finish = await driver.generate(PROMPT, 100)
    assert finish is FinishReason.CONTEXT
    assert len(PROMPT) + len(tokens) == 32
    await driver.generate([1] * 31, 1, session="t")
    with pytest.raises(EngineError, match="context has 32 tokens, expected at most 31"):
        await driver.generate([1] * 32, 1, session="u")


async def test_closing_the_stream_early_keeps_the_session(make: Make) -> None:
    driver = make()
    whole, _, _ = await driver.generate(PROMPT, 60, session="whole", seed=1)
    request = GenerateRequest(tuple(PROMPT), "s", 10_000, sampling=SamplingParams(seed=1))
    stream = driver.engine.generate(request)
    chunk = await anext(stream)
    await stream.aclose()
    read = list(chunk.token_ids)
    assert read == whole[: len(read)]
    steps = driver.engine.counters.steps
    rest, _, _ = await driver.generate(PROMPT + read, 60 - len(read), seed=1)
    assert read + rest == whole
    # Only the last token read is computed again, and the abandoned call has stopped.
    assert driver.prefill[-1] == 1
    assert driver.engine.counters.steps - steps <= 2 + 60 - len(read)


async def test_cancelling_the_consumer_stops_the_sequence(make: Make) -> None:
    driver = make(max_context=256)
    task = asyncio.create_task(driver.generate(PROMPT, 10_000))
    await driver.until(lambda: driver.engine.counters.decode_tokens >= 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()
    await settle(driver.engine, 1)
    steps = driver.engine.counters.steps
    await asyncio.sleep(0.05)
    assert driver.engine.counters.steps == steps
    await driver.engine.release("s")
    await settle(driver.engine, 0, 0)


async def test_calls_wait_their_turn(make: Make) -> None:
    driver = make(max_sequences=2)
    finished: list[int] = []

    async def one(i: int) -> None:
        await driver.generate(PROMPT, 6, session=f"s{i}", seed=i)
        finished.append(i)
        await driver.engine.release(f"s{i}")

    await asyncio.gather(*[one(i) for i in range(7)])
    assert finished == sorted(finished)
    await settle(driver.engine, 0, 0)


async def test_fork_costs_no_prefill_and_shares_what_it_can(make: Make) -> None:
    driver = make(max_sequences=2)
    ids = PROMPT * 5
    tokens, _, _ = await driver.generate(ids, 10)
    at = 46
    names = await driver.engine.fork("s", 6, at)
    assert len(set(names)) == 6
    assert "s" not in names
    # 49 of the parent's tokens in 4 blocks; the children hold nothing beside.
    budget = driver.engine.kv_budget
    assert (budget.live_sequences, budget.live_tokens) == (7, 64)
    context = [*ids, *tokens[:6], 42]
    together = await asyncio.gather(
        *[driver.generate(context, 3, session=name, seed=3) for name in names]
    )
    assert driver.prefill == [40, 1, 1, 1, 1, 1, 1]
    truth = driver.truth(context + together[0][0], 3)
    for new, logprobs, _ in together:
        assert new == together[0][0]
        assert logprobs == pytest.approx(truth, abs=5e-5)
    # Of the parent's blocks the last one is no longer shared: each child has one (or two) instead.
    assert driver.engine.kv_budget.live_tokens == 32 + 32 + 6 * 32
    await driver.generate(ids + tokens, 4)
    assert driver.prefill[-1] == 1
    for name in (*names, "s"):
        await driver.engine.release(name)
    await settle(driver.engine, 0, 0)


async def test_truncate_forgets_kv(make: Make) -> None:
    driver = make()
    ids = [*PROMPT, *range(20, 45)]
    tokens, _, _ = await driver.generate(ids, 10)
    assert driver.engine.kv_budget.live_tokens == 48
    await driver.engine.truncate("s", 21)
    assert driver.engine.kv_budget.live_tokens == 32
    await driver.generate([*ids[:21], *tokens], 1)
    assert driver.prefill == [33, 10]
    await driver.engine.truncate("s", 0)
    assert driver.engine.kv_budget.live_tokens == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.fork("x", 1, 0), "no session 'x', expected one that has generated"),
        (lambda e: e.fork("s", 0, 0), "fork into 0 sessions, expected at least 1"),
        (lambda e: e.fork("s", 1, 99), "at_token is 99, expected 0 to 10"),
        (lambda e: e.truncate("x", 0), "no session 'x'"),
        (lambda e: e.truncate("s", -1), "at_token is -1, expected 0 to 10"),
        (lambda e: e.update_weights(0), "version is 0, expected more than 0"),
    ],
)
async def test_wrong_calls_say_what_was_expected(make: Make, call: Any, message: str) -> None:
    driver = make()
    await driver.generate(PROMPT, 2)
    with pytest.raises(EngineError, match=message):
        await call(driver.engine)
    # And the engine goes on.
    await driver.generate(PROMPT, 2)


async def test_token_ids_outside_the_vocabulary_are_refused(make: Make) -> None:
    driver = make()
    with pytest.raises(EngineError, match="token id 61 in the context, expected 0 to 60"):
        await driver.generate([1, 61, 2], 1)
    with pytest.raises(EngineError, match="token id -1 in the context"):
        await driver.generate([1, -1, 2], 1)


async def test_a_session_generates_once_at_a_time(make: Make) -> None:
    driver = make()
    task = asyncio.create_task(driver.generate(PROMPT, 60))
    await driver.until(lambda: driver.engine.counters.decode_tokens >= 2)
    with pytest.raises(EngineError, match="session 's' is generating"):
        await driver.generate(PROMPT, 1)
    with pytest.raises(EngineError, match="session 's' is generating"):
        await driver.engine.truncate("s", 1)
    tokens, _, _ = await task
    assert len(tokens) == 60


async def test_release_in_flight_fails_that_stream_only(make: Make) -> None:
    driver = make(max_context=256)
    doomed = asyncio.create_task(driver.generate(PROMPT, 10_000, session="doomed"))
    other = asyncio.create_task(driver.generate(PROMPT, 40, session="other"))
    await driver.until(lambda: driver.engine.counters.decode_tokens >= 4)
    await driver.engine.release("doomed")
    with pytest.raises(EngineError, match="session 'doomed' was released while"):
        await doomed
    tokens, _, _ = await other
    assert len(tokens) == 40
    await settle(driver.engine, 1)


async def test_a_watch_that_raises_fails_its_own_stream(make: Make) -> None:
    driver = make()

    def watch(token: int) -> bool:
        raise ZeroDivisionError("oops")

    other = asyncio.create_task(driver.generate(PROMPT, 20, session="other"))
    with pytest.raises(EngineError, match="watch raised ZeroDivisionError: oops"):
        await driver.generate(PROMPT, 5, watch=watch)
    assert len((await other)[0]) == 20


async def test_logits_that_are_not_finite_end_the_stream(make: Make) -> None:
    driver = make("llama", initializer_range=0.1)
    with torch.no_grad():
        driver.model.model.norm.weight.fill_(float("nan"))
    await driver.engine.update_weights(1)
    with pytest.raises(EngineError, match="logits of session 's' are not finite"):
        await driver.generate(PROMPT, 5)


async def test_close_fails_streams_in_flight_and_later_calls(make: Make) -> None:
    driver = make(max_sequences=2, max_context=256)
    tasks = [
        asyncio.create_task(driver.generate(PROMPT, 10_000, session=f"s{i}")) for i in range(4)
    ]
    await driver.until(lambda: driver.engine.counters.decode_tokens >= 4)
    await driver.engine.aclose()
    for task in tasks:
        with pytest.raises(EngineError, match="the engine is closed"):
            await task
    with pytest.raises(EngineError, match="the engine is closed"):
        await driver.generate(PROMPT, 1)
    with pytest.raises(EngineError, match="the engine is closed"):
        await driver.engine.truncate("s0", 1)
    await driver.engine.release("s0")
    await driver.engine.aclose()


async def test_a_broken_model_reaches_every_stream(make: Make) -> None:
    driver = make("qwen2", initializer_range=0.1)
    calls = 0

    def explode(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise MemoryError("no more of it")

    driver.model.model.norm.register_forward_hook(explode)
    await driver.engine.update_weights(1)  # takes the model as it is now, hook included
    tasks = [asyncio.create_task(driver.generate(PROMPT, 100, session=f"s{i}")) for i in range(6)]
    for task in tasks:
        with pytest.raises(EngineError, match="the engine broke: MemoryError: no more of it"):
            await task
    with pytest.raises(EngineError, match="the engine broke"):
        await driver.generate(PROMPT, 1)


def test_an_engine_outlives_an_event_loop(models: Any, driver_class: Any) -> None:
    """A loop that dies with a stream in flight takes neither the thread nor the slot with it."""
    engine = PagedEngine(models["qwen3"], max_sequences=1, max_context=256)
    driver = driver_class(engine, models["qwen3"])

    async def abandon() -> None:
        request = GenerateRequest(tuple(PROMPT), "lost", 10_000)
        stream = engine.generate(request)
        await anext(stream)

    asyncio.run(abandon())

    async def use() -> None:
        tokens, _, _ = await driver.generate(PROMPT, 5, session="new")
        assert len(tokens) == 5
        await engine.aclose()

    asyncio.run(use())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_sequences": 0, "max_context": 8}, "max_sequences is 0, expected at least 1"),
        ({"max_sequences": 1, "max_context": 1}, "max_context is 1, expected 2 to 256"),
        ({"max_sequences": 1, "max_context": 257}, "max_context is 257, expected 2 to 256"),
        (
            {"max_sequences": 1, "max_context": 8, "block_size": 0},
            "block_size is 0, expected at least 1",
        ),
        (
            {"max_sequences": 4, "max_context": 120, "kv_tokens": 127},
            "kv_tokens is 127, expected at least 128: one sequence of max_context 120",
        ),
        (
            {"max_sequences": 1, "max_context": 8, "kv_tokens": 1 << 50},
            "no memory for a KV pool of 1125899906842624 tokens, 402653184.0 GiB on cpu",
        ),
    ],
)
def test_sizes_that_cannot_work(models: Any, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        PagedEngine(models["qwen3"], **sizes)


def test_attention_we_do_not_implement_is_refused(make: Make) -> None:
    with pytest.raises(EngineError, match="asks for sliding_window=16, expected plain causal"):
        make("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=0)


async def test_from_pretrained_gives_the_same_model(make: Make, tmp_path: Path) -> None:
    driver = make("qwen3")
    driver.model.save_pretrained(tmp_path)
    expected, _, _ = await driver.generate(PROMPT, 12, temperature=0.0)
    engine = PagedEngine.from_pretrained(tmp_path, max_sequences=1, max_context=64)
    request = GenerateRequest(tuple(PROMPT), "s", 12, sampling=SamplingParams(temperature=0.0))
    tokens = [t async for chunk in engine.generate(request) for t in chunk.token_ids]
    await engine.aclose()
    assert tokens == expected


def test_a_missing_or_broken_model_is_one_line(tmp_path: Path) -> None:
    sizes = {"max_sequences": 1, "max_context": 8}
    with pytest.raises(EngineError, match="expected a folder with a config") as missing:
        PagedEngine.from_pretrained(tmp_path / "nothing", **sizes)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(EngineError, match="cannot load the model at") as broken:
        PagedEngine.from_pretrained(tmp_path, **sizes)
    for error in (missing, broken):
        assert "\n" not in str(error.value)


def test_an_engine_that_is_dropped_or_left_open_ends_cleanly() -> None:
    """Dropped: its thread goes. Left generating at exit: the process ends, and not by abort()."""
    code = """
import asyncio, gc, sys, threading
from transformers import LlamaConfig, LlamaForCausalLM
from thor_fast.engines.base import GenerateRequest
from thor_fast.engines.paged import PagedEngine

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=4096)
model = LlamaForCausalLM(LlamaConfig(**sizes))
dropped = PagedEngine(model, max_sequences=2, max_context=64)
del dropped
gc.collect()
assert [t.name for t in threading.enumerate()] == ["MainThread"]
engine = PagedEngine(model, max_sequences=8, max_context=4096)

async def main():
    streams = [engine.generate(GenerateRequest((1, 2), str(i), 4000)) for i in range(8)]
    await asyncio.gather(*[anext(s) for s in streams])

asyncio.new_event_loop().run_until_complete(main())
assert engine.counters.decode_tokens < 8 * 4000
sys.exit(5)
"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 5, run.stderr
    assert "terminate" not in run.stderr
