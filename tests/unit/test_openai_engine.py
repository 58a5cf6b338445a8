"""The HTTP engine against a server that answers as vLLM's does, and as one should not."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, asynccontextmanager

import pytest

from thor_fast.engines import openai as module
from thor_fast.engines.base import FinishReason, GenerateRequest, KVBudget, SamplingParams
from thor_fast.engines.openai import OpenAIEngine
from thor_fast.errors import EngineError

from .completions_server import CompletionsServer

PROMPT = (11, 12, 13)


def following(body: dict, index: int) -> int:
    """Counts on from the prompt's last token: what is said depends on the context alone."""
    return body["prompt"][-1] + 1 + index


@asynccontextmanager
async def connected(server: CompletionsServer, **settings):
    settings = {"model": "tiny", "max_sequences": 4, "max_context": 64, **settings}
    async with server.serving() as url:
        engine = OpenAIEngine(url, **settings)
        try:
            yield engine
        finally:
            await engine.aclose()


async def collect(engine, *, ids=PROMPT, max_tokens=5, session="s", stop=(), **sampling):
    request = GenerateRequest(
        tuple(ids), session, max_tokens, frozenset(stop), SamplingParams(**sampling)
    )
    chunks = [chunk async for chunk in engine.generate(request)]
    assert all(chunk.finish is None for chunk in chunks[:-1])
    tokens = [t for chunk in chunks for t in chunk.token_ids]
    return tokens, [p for chunk in chunks for p in chunk.logprobs], chunks[-1].finish


async def test_ids_go_in_and_come_out() -> None:
    server = CompletionsServer(following)
    async with connected(server, api_key="sesame") as engine:
        tokens, logprobs, finish = await collect(engine, stop=[99], seed=3)
        assert (tokens, finish) == ([14, 15, 16, 17, 18], FinishReason.LENGTH)
        assert logprobs == [-0.014, -0.015, -0.016, -0.017, -0.018]
        assert engine.kv_budget == KVBudget(4, 256, 1, 8)
        tokens, _, finish = await collect(engine, stop=[16])
        assert (tokens, finish) == ([14, 15, 16], FinishReason.STOP)
        tokens, _, finish = await collect(engine, ids=range(1, 61), max_tokens=50)
        assert (tokens, finish) == ([61, 62, 63, 64], FinishReason.CONTEXT)
        await engine.update_weights(4)
        await collect(engine)
        await engine.release("s")
        assert engine.kv_budget.live_sequences == 0
    first = server.bodies[0]
    assert first.pop("seed") != server.bodies[1]["seed"]
    assert first == {
        "model": "tiny",
        "prompt": list(PROMPT),
        "max_tokens": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": 1,
        "stream": True,
        "return_token_ids": True,
        "stop_token_ids": [99],
        "ignore_eos": True,
        "cache_salt": "w0",
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert server.bodies[-1]["cache_salt"] == "w4"
    assert "post /v1/completions http/1.1" in server.headers[0]
    assert "authorization: bearer sesame" in server.headers[0]


async def test_a_pause_waits_and_goes_on() -> None:
    server = CompletionsServer(following)
    async with connected(server, pause_token_ids=frozenset({15, 17})) as engine:
        request = GenerateRequest(PROMPT, "s", 5)
        async with aclosing(engine.generate(request)) as stream:
            chunks = [await anext(stream), await anext(stream)]
            assert [c.token_ids for c in chunks] == [(14,), (15,)]
            assert len(server.bodies) == 1
            rest = [chunk async for chunk in stream]
        assert [t for c in rest for t in c.token_ids] == [16, 17, 18]
        assert [b["prompt"][-1] for b in server.bodies] == [13, 15, 17]
        assert [b["max_tokens"] for b in server.bodies] == [5, 3, 1]
        assert (await collect(engine, max_tokens=2))[2] is FinishReason.LENGTH
        assert (await collect(engine, stop=[15]))[2] is FinishReason.STOP


async def test_fork_and_truncate_keep_the_books() -> None:
    async with connected(CompletionsServer(following)) as engine:
        await collect(engine)
        names = await engine.fork("s", 2, 6)
        assert engine.kv_budget.live_tokens == 8 + 2 * 6
        assert (await collect(engine, ids=(*PROMPT, 14), session=names[0]))[0][0] == 15
        await engine.truncate("s", 4)
        for call, message in [
            (engine.fork("s", 1, 5), "at_token is 5, expected 0 to 4, the tokens of session 's'"),
            (engine.fork("s", 0, 1), "fork into 0 sessions, expected at least 1"),
            (engine.truncate("nobody", 0), "no session 'nobody', expected one that has generated"),
            (engine.update_weights(0), "weight version is 0, expected more than 0"),
        ]:
            with pytest.raises(EngineError, match=message):
                await call


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.001)


@pytest.mark.usefixtures("impatient")
async def test_broken_connections_cost_no_token() -> None:
    server = CompletionsServer(following, refuse=[503, 429], break_after=[2, 0, 1])
    async with connected(server) as engine:
        tokens, logprobs, finish = await collect(engine)
    assert (tokens, finish) == ([14, 15, 16, 17, 18], FinishReason.LENGTH)
    assert logprobs == [-0.014, -0.015, -0.016, -0.017, -0.018]
    assert [len(b["prompt"]) for b in server.bodies] == [3, 5, 5, 6]


@pytest.mark.usefixtures("impatient")
async def test_attempts_are_counted() -> None:
    server = CompletionsServer(following, refuse=[503] * 9)
    async with connected(server) as engine:
        with pytest.raises(EngineError, match=r"failed 5 times \(status 503: .*not now.*expected"):
            await collect(engine)
    assert len(server.refuse) == 4
    nobody = OpenAIEngine("http://127.0.0.1:9/v1", model="tiny", max_sequences=1, max_context=64)
    with pytest.raises(EngineError, match=r"127.0.0.1:9/v1/completions failed 5 times \(Connect"):
        await collect(nobody)
    await nobody.aclose()


async def test_refusals_are_not_tried_again() -> None:
    server = CompletionsServer(following, refuse=[404] * 2)
    async with connected(server) as engine:
        with pytest.raises(EngineError, match=r"answered session 's' with status 404: .*not now"):
            await collect(engine)
    assert len(server.refuse) == 1


def _choice(**changes):
    def edit(event: dict) -> dict:
        event["choices"][0] |= changes
        return event

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_choice(token_ids=None), "sent no token_ids for session 's', expected them as"),
        (_choice(logprobs=None), "sent 1 token_ids and 0 token_logprobs for session 's', expected"),
        (_choice(logprobs={"token_logprobs": [None]}), "log-probs of session 's' are not finite"),
        (_choice(prompt_token_ids=[1, 2]), "read a prompt of 2 tokens, expected the 3 that were"),
        (_choice(finish_reason="stop"), "ended session 's' with 'stop' at token 14 after 1 of 5"),
        (_choice(finish_reason="abort"), "ended session 's' with 'abort' at token 14 after 1 of"),
        (lambda _: {"error": {"message": "out of cheese"}}, "broke off session 's': out of cheese"),
        (lambda _: {"error": "so there"}, "the server broke off session 's': so there"),
        (lambda _: [], r"the server sent '\[\]' for session 's', expected a completion chunk"),
        (lambda _: {}, "the server sent '{}' for session 's', expected a completion chunk"),
    ],
)
async def test_what_a_server_should_not_say(edit, message) -> None:
    async with connected(CompletionsServer(following, edit=edit)) as engine:
        with pytest.raises(EngineError, match=message):
            await collect(engine)


async def test_events_without_choices_are_skipped() -> None:
    def edit(event: dict) -> dict:
        return event if event["choices"][0]["token_ids"] != [14] else {"choices": []}

    async with connected(CompletionsServer(following, edit=edit)) as engine:
        assert (await collect(engine, max_tokens=3, stop=[16]))[0] == [15, 16]


async def test_release_and_close_end_the_streams() -> None:
    server = CompletionsServer(following)
    server.delay_s = 0.01
    async with connected(server, max_context=100_000) as engine:
        doomed = [
            asyncio.create_task(collect(engine, session=f"d{i}", max_tokens=9000)) for i in range(3)
        ]
        async with asyncio.timeout(20):
            while engine.kv_budget.live_tokens < 3 * 5:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        with pytest.raises(EngineError, match="session 'd0' is generating, expected it idle"):
            await collect(engine, session="d0")
        with pytest.raises(EngineError, match="'d0' is generating, expected it idle to truncate"):
            await engine.truncate("d0", 1)
        await engine.release("d0")
        with pytest.raises(EngineError, match="session 'd0' was released while it was generating"):
            await doomed[0]
        doomed[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed[1]
        await engine.aclose()
        with pytest.raises(EngineError, match="the engine is closed"):
            await doomed[2]
        for call in (collect(engine), engine.update_weights(1)):
            with pytest.raises(EngineError, match="the engine is closed"):
                await call
        # The server notices that nobody listens.
        async with asyncio.timeout(20):
            while server.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, expected 0 or 1 unless the server"),
        ({"top_p": 0.9}, "top_k is 0 and top_p 0.9, expected 0 and 1"),
        ({"top_k": 5}, "top_k is 5 and top_p 1.0, expected 0 and 1"),
    ],
)
async def test_sampling_that_would_bend_the_logprobs_is_refused(sampling, message) -> None:
    async with connected(CompletionsServer(following)) as engine:
        with pytest.raises(EngineError, match=message):
            await collect(engine, **sampling)
        assert len((await collect(engine, **{**sampling, "temperature": 0.0}))[0]) == 5


async def test_a_server_with_processed_logprobs_takes_any_temperature() -> None:
    server = CompletionsServer(following)
    async with connected(server, processed_logprobs=True) as engine:
        await collect(engine, temperature=0.7)
    assert server.bodies[0]["temperature"] == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "max_sequences is 0, expected at least 1"),
        ({"max_context": 1}, "max_context is 1, expected at least 2"),
    ],
)
def test_settings_that_cannot_work(settings, message) -> None:
    with pytest.raises(EngineError, match=message):
        OpenAIEngine(
            "http://x/v1", **{"model": "m", "max_sequences": 1, "max_context": 9} | settings
        )


def test_without_the_client_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(EngineError, match=r"expected pip install 'thor_fast\[openai\]'"):
        OpenAIEngine("http://x/v1", model="m", max_sequences=1, max_context=9)
