"""The scripted engine keeps the engine contract, so that tests on it mean something."""

from __future__ import annotations

import time

import pytest

from thor_fast.engines.base import Engine, FinishReason, GenerateRequest, TokenChunk
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.errors import EngineError

PROMPT = (1, 2, 3)
SCRIPT = Script((10, 11, 12, 13, 99), (-0.1, -0.2, -0.3, -0.4, -0.5))


def request(token_ids=PROMPT, *, session="s", max_tokens=100, **options) -> GenerateRequest:
    return GenerateRequest(
        tuple(token_ids), session, max_tokens, stop_token_ids=frozenset({99}), **options
    )


async def play(engine: ScriptedEngine, *args, **options) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(request(*args, **options))]


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [t for c in chunks for t in c.token_ids]


async def test_keeps_the_protocol() -> None:
    assert isinstance(ScriptedEngine({}), Engine)


async def test_plays_a_script_to_its_stop_token() -> None:
    chunks = await play(ScriptedEngine({PROMPT: [SCRIPT]}, chunk_tokens=2))
    assert [c.token_ids for c in chunks] == [(10, 11), (12, 13), (99,)]
    assert [c.logprobs for c in chunks] == [(-0.1, -0.2), (-0.3, -0.4), (-0.5,)]
    assert [c.finish for c in chunks] == [None, None, FinishReason.STOP]
    assert [c.prefill_tokens for c in chunks] == [3, None, None]


async def test_log_probs_default_to_a_constant() -> None:
    (chunk,) = await play(ScriptedEngine({PROMPT: [Script((99,))]}))
    assert chunk.logprobs == (-0.5,)


async def test_scripts_of_one_prompt_take_turns() -> None:
    engine = ScriptedEngine({PROMPT: [Script((10, 99)), Script((20, 99))]})
    played = [tokens(await play(engine, session=name)) for name in "abc"]
    assert played == [[10, 99], [20, 99], [10, 99]]


async def test_max_tokens_and_context() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]}, max_context=6)
    chunks = await play(engine, max_tokens=2)
    assert (tokens(chunks), chunks[-1].finish) == ([10, 11], FinishReason.LENGTH)
    chunks = await play(engine, [*PROMPT, 10, 11])
    assert (tokens(chunks), chunks[-1].finish) == ([12], FinishReason.CONTEXT)
    with pytest.raises(EngineError, match=r"context has 6 tokens, expected fewer than .* 6"):
        await play(engine, [*PROMPT, 10, 11, 12])


async def test_watch_sees_each_token_and_ends_the_call() -> None:
    seen: list[int] = []

    def watch(token_id: int) -> bool:
        seen.append(token_id)
        return token_id == 12

    chunks = await play(ScriptedEngine({PROMPT: [SCRIPT]}, chunk_tokens=8), watch=watch)
    assert tokens(chunks) == seen == [10, 11, 12]
    assert chunks[-1].finish is FinishReason.WATCH


async def test_without_watch_it_runs_on() -> None:
    chunks = await play(ScriptedEngine({PROMPT: [SCRIPT]}, watch=False), watch=lambda _: True)
    assert tokens(chunks) == list(SCRIPT.token_ids)


async def test_resuming_prefills_only_what_is_new() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    await play(engine, max_tokens=2)
    chunks = await play(engine, [*PROMPT, 10, 11, 70, 71], max_tokens=1)
    assert (tokens(chunks), chunks[0].prefill_tokens) == ([12], 2)


async def test_truncate_rewinds_the_script() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    await play(engine, max_tokens=4)
    await engine.truncate("s", 4)
    assert engine.kv_budget.live_tokens == 4
    assert tokens(await play(engine, [*PROMPT, 10, 70])) == [11, 12, 13, 99]


async def test_a_shorter_request_rewinds_as_well() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    await play(engine, max_tokens=4)
    chunks = await play(engine, [*PROMPT, 10, 70])
    assert (tokens(chunks), chunks[0].prefill_tokens) == ([11, 12, 13, 99], 1)


async def test_closing_the_stream_keeps_the_session() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    stream = engine.generate(request())
    assert (await anext(stream)).token_ids == (10,)
    await stream.aclose()
    assert engine.kv_budget.live_sequences == 1
    assert tokens(await play(engine, [*PROMPT, 10])) == [11, 12, 13, 99]


async def test_forks_go_on_or_play_their_branch() -> None:
    branch = (*PROMPT, 10)
    engine = ScriptedEngine({PROMPT: [SCRIPT], branch: [Script((20, 99)), Script((30, 99))]})
    await play(engine)
    a, b = await engine.fork("s", 2, at_token=4)
    assert tokens(await play(engine, branch, session=a)) == [20, 99]
    assert tokens(await play(engine, branch, session=b)) == [30, 99]
    (c,) = await engine.fork("s", 1, at_token=5)
    chunks = await play(engine, [*PROMPT, 10, 11], session=c)
    assert (tokens(chunks), chunks[0].prefill_tokens) == ([12, 13, 99], 0)
    assert len({a, b, c, "s"}) == 4


async def test_release_and_new_weights() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    await play(engine, max_tokens=2)
    await engine.update_weights(3)
    assert (engine.weight_version, engine.kv_budget.live_tokens) == (3, 0)
    chunks = await play(engine, [*PROMPT, 10, 11], max_tokens=1)
    assert (tokens(chunks), chunks[0].prefill_tokens) == ([12], 5)
    await engine.release("s")
    await engine.release("s")
    assert engine.kv_budget.live_sequences == 0
    with pytest.raises(EngineError, match="weight version is 3, expected above 3"):
        await engine.update_weights(3)


async def test_a_call_without_room_costs_others_their_kv_the_oldest_first() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]}, kv_tokens=12)
    for session in ("a", "b"):
        assert tokens(await play(engine, max_tokens=2, session=session)) == [10, 11]
    assert (engine.kv_budget.live_tokens, engine.evictions) == (10, 0)
    assert tokens(await play(engine, max_tokens=1, session="c")) == [10]
    assert (engine.kv_budget.live_tokens, engine.evictions) == (9, 1)
    for session, prefill in (("b", 1), ("a", 6)):
        chunks = await play(engine, [*PROMPT, 10, 11, 50], session=session)
        assert (tokens(chunks), chunks[0].prefill_tokens) == ([12, 13, 99], prefill)
    with pytest.raises(EngineError, match="13 tokens at once, expected at most 12"):
        await play(engine, [*PROMPT, *range(10)], session="a")


async def test_closing_breaks_streams_in_flight() -> None:
    engine = ScriptedEngine({PROMPT: [SCRIPT]})
    stream = engine.generate(request())
    await anext(stream)
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(EngineError, match="engine is closed"):
        await anext(stream)


async def test_errors_name_what_is_wrong() -> None:
    engine = ScriptedEngine({PROMPT: [Script((10,))]}, max_sequences=1)
    with pytest.raises(EngineError, match="no script for a context of 1 tokens"):
        await play(engine, [7])
    with pytest.raises(EngineError, match="used up after 1 tokens"):
        await play(engine)
    with pytest.raises(EngineError, match="2 sequences at once, expected at most 1"):
        await play(engine, session="other")
    with pytest.raises(EngineError, match=r"no session 'x', expected one of \['s'\]"):
        await engine.truncate("x", 0)
    with pytest.raises(EngineError, match="at_token is 9, expected 0 to 4"):
        await engine.fork("s", 1, 9)
    failing = ScriptedEngine({PROMPT: [Script((10, 99), fail_at=1)]})
    with pytest.raises(EngineError, match="fail at token 1"):
        await play(failing)


def test_scripts_are_checked() -> None:
    with pytest.raises(ValueError, match="script has 1 log-probs, expected 2"):
        Script((1, 2), (-0.1,))
    with pytest.raises(ValueError, match="no scripts, expected at least one each"):
        ScriptedEngine({PROMPT: []})
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        ScriptedEngine({}, chunk_tokens=0)


async def test_tokens_take_their_time() -> None:
    started = time.perf_counter()
    await play(ScriptedEngine({PROMPT: [SCRIPT]}, token_s=0.01))
    assert time.perf_counter() - started >= 5 * 0.009
