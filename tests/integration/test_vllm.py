"""vLLM behind the engine contract, on the CPU: exact ids, true log-probs, nothing left behind.

vLLM is not part of the test extra; what needs it is skipped without it. Importing and running it
raises warnings of its own, so they are not errors here.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from types import SimpleNamespace

import numpy as np
import pytest
import pytest_asyncio

from thor_fast.engines.base import FinishReason, GenerateRequest, KVBudget
from thor_fast.engines.vllm import VLLMEngine
from thor_fast.errors import EngineError

from .vllm_model import (
    BLOCK,
    LOGPROB_TOLERANCE,
    MAX_CONTEXT,
    PROMPT,
    VOCAB,
    build_model,
    generate,
    greedy,
    needs_vllm,
    prompt,
    truth,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    # An end-of-sequence token of the model's own, in the middle of what it says to this prompt.
    model.generation_config.eos_token_id = model.config.eos_token_id = greedy(model, PROMPT, 9)[-1]
    model.save_pretrained(path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(vllm_environment, folder):
    engine = VLLMEngine.from_pretrained(
        folder, max_sequences=8, max_context=MAX_CONTEXT, enforce_eager=True, block_size=BLOCK
    )
    yield engine
    await engine.aclose()


def test_without_vllm_the_error_says_what_to_install(monkeypatch, folder) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"expected pip install 'thor_fast\[vllm\]'"):
        VLLMEngine.from_pretrained(folder, max_sequences=1, max_context=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "max_sequences is 0, expected at least 1"),
        ({"max_context": 1}, "max_context is 1, expected at least 2"),
        ({"logprobs_mode": "raw_logits"}, "engine_args sets logprobs_mode, expected none of"),
    ],
)
def test_settings_that_cannot_work(folder, settings, message) -> None:
    with pytest.raises(EngineError, match=message):
        VLLMEngine.from_pretrained(folder, **{"max_sequences": 1, "max_context": 64, **settings})


def test_a_missing_model_is_named(tmp_path) -> None:
    with pytest.raises(EngineError, match=r"no model at '.*nothing', expected a folder with a con"):
        VLLMEngine.from_pretrained(tmp_path / "nothing", max_sequences=1, max_context=64)


def test_the_budget_is_what_the_pool_holds() -> None:
    # Block 0 holds nobody's tokens; 10 blocks of 32 are left.
    cache = SimpleNamespace(num_gpu_blocks=11, block_size=32)
    model = SimpleNamespace(get_vocab_size=lambda: VOCAB)
    llm = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache), model_config=model)
    for splice_kv in (False, True):
        engine = VLLMEngine(llm, max_sequences=8, max_context=128, splice_kv=splice_kv)
        assert engine.kv_budget == KVBudget(8, 320, 0, 0, 32)
    # Room for one, however small the pool.
    engine = VLLMEngine(llm, max_sequences=8, max_context=1024)
    assert engine.kv_budget == KVBudget(8, 1024, 0, 0, 32)


@needs_vllm
def test_a_context_longer_than_the_model_does_not_start(vllm_environment, folder) -> None:
    with pytest.raises(EngineError, match=r"vLLM does not start on .*2048.*1024") as error:
        VLLMEngine.from_pretrained(folder, max_sequences=1, max_context=2048)
    assert "\n" not in str(error.value)


@needs_vllm
async def test_greedy_equals_generate(engine, model) -> None:
    prompts = [prompt(n, n) for n in (1, 17, 31, 32, 33, 64, 100)]
    results = await asyncio.gather(
        *(generate(engine, ids, 40, session=f"g{len(ids)}", temperature=0.0) for ids in prompts)
    )
    for ids, (tokens, _, finish, _) in zip(prompts, results, strict=True):
        assert tokens == greedy(model, ids, 40)
        assert len(set(tokens)) > 5
        assert finish is FinishReason.LENGTH
        await engine.release(f"g{len(ids)}")


@needs_vllm
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.3])
async def test_logprobs_are_the_models(engine, model, temperature) -> None:
    async def one(n: int) -> None:
        ids = prompt(n, n)
        tokens, logprobs, _, _ = await generate(
            engine, ids, 40, session=f"p{n}", temperature=temperature, seed=n
        )
        expected = truth(model, ids + tokens, temperature)[n:]
        np.testing.assert_allclose(logprobs, expected, atol=LOGPROB_TOLERANCE, rtol=0)
        await engine.release(f"p{n}")

    await asyncio.gather(*(one(n) for n in (3, 32, 50, 97)))


@needs_vllm
async def test_only_the_requests_own_stop_tokens_stop_it(engine, model) -> None:
    free = greedy(model, PROMPT, 60)
    tokens, _, finish, _ = await generate(engine, PROMPT, 60, temperature=0.0)
    assert model.config.eos_token_id in tokens
    assert (tokens, finish) == (free, FinishReason.LENGTH)
    stop = free[20]
    n_tokens = free.index(stop) + 1
    tokens, logprobs, finish, _ = await generate(engine, PROMPT, 60, stop=[stop], temperature=0.0)
    assert (tokens, finish) == (free[:n_tokens], FinishReason.STOP)
    assert len(logprobs) == n_tokens


@needs_vllm
async def test_length_and_context(engine) -> None:
    ids = prompt(MAX_CONTEXT - 10)
    tokens, _, finish, _ = await generate(engine, ids, 9)
    assert (len(tokens), finish) == (9, FinishReason.LENGTH)
    tokens, _, finish, _ = await generate(engine, ids, 100)
    assert (len(tokens), finish) == (10, FinishReason.CONTEXT)
    with pytest.raises(EngineError, match="context has 256 tokens, expected at most 255 to start"):
        await generate(engine, prompt(MAX_CONTEXT))


@needs_vllm
async def test_a_seed_gives_the_same_tokens_in_a_crowd(engine) -> None:
    ids = prompt(25)
    alone, *_ = await generate(engine, ids, 30, session="alone", seed=7)
    (again, *_), (other, *_), *_ = await asyncio.gather(
        generate(engine, ids, 30, session="again", seed=7),
        generate(engine, ids, 30, session="other", seed=8),
        *(generate(engine, prompt(9 + i, i), 30, session=f"c{i}", seed=i) for i in range(4)),
    )
    assert again == alone
    assert other != alone


@needs_vllm
async def test_resuming_computes_the_last_block_and_what_is_new(engine) -> None:
    ids = prompt(70, 5)
    tokens, _, _, prefill = await generate(engine, ids, 30, session="r")
    assert prefill == 70
    context = [*ids, *tokens, *prompt(11, 9)]
    _, _, _, prefill = await generate(engine, context, 4, session="r")
    # 99 tokens have KV: the last one sampled has none yet. They fill three blocks of 32.
    assert prefill == len(context) - 3 * BLOCK
    assert engine.kv_budget.live_tokens >= len(context) + 4


@needs_vllm
async def test_closing_early_frees_the_request(engine) -> None:
    request = GenerateRequest(tuple(prompt(40, 2)), "early", MAX_CONTEXT, frozenset())
    for _ in range(12):  # more than there are sequences
        async with aclosing(engine.generate(request)) as stream:
            async for _ in stream:
                break
    await nothing_held(engine)
    tokens, *_ = await generate(engine, request.token_ids, 5, session="early")
    assert len(tokens) == 5


async def nothing_held(engine) -> None:
    """vLLM resets its prefix cache only if no request holds a block."""
    assert engine._llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(30):
        while not await engine._llm.reset_prefix_cache():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@needs_vllm
async def test_cancelling_frees_the_request(engine) -> None:
    task = asyncio.create_task(generate(engine, prompt(30), 200, session="cancelled"))
    await started(engine, "cancelled", 31)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_held(engine)
    await engine.release("cancelled")


async def started(engine, session: str, n_tokens: int) -> None:
    """Wait until a session has so many tokens."""
    async with asyncio.timeout(60):
        while session not in engine._sessions or engine._sessions[session].length < n_tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@needs_vllm
async def test_release_in_flight_fails_that_stream_only(engine) -> None:
    doomed = asyncio.create_task(generate(engine, prompt(30), 200, session="doomed"))
    other = asyncio.create_task(generate(engine, prompt(31), 60, session="other"))
    await started(engine, "doomed", 33)
    with pytest.raises(EngineError, match="session 'doomed' is generating, expected it idle"):
        await generate(engine, prompt(5), session="doomed")
    with pytest.raises(EngineError, match="'doomed' is generating, expected it idle to truncate"):
        await engine.truncate("doomed", 1)
    await engine.release("doomed")
    with pytest.raises(EngineError, match="session 'doomed' was released while it was generating"):
        await doomed
    assert len((await other)[0]) == 60
    await nothing_held(engine)


@needs_vllm
async def test_fork_and_truncate_keep_the_books(engine, model) -> None:
    ids = prompt(40, 3)
    tokens, *_ = await generate(engine, ids, 20, session="parent", temperature=0.0)
    before = engine.kv_budget
    names = await engine.fork("parent", 2, 50)
    after = engine.kv_budget
    assert after.live_sequences == before.live_sequences + 2
    assert after.live_tokens == before.live_tokens + 100
    branch = [*ids, *tokens[:10], 77]
    for name in names:
        got, _, _, prefill = await generate(engine, branch, 10, session=name, temperature=0.0)
        assert got == greedy(model, branch, 10)
        assert prefill == len(branch) - BLOCK
    await engine.truncate("parent", 45)
    for call, message in [
        (engine.fork("parent", 1, 46), "at_token is 46, expected 0 to 45, the tokens of session"),
        (engine.fork("parent", 0, 1), "fork into 0 sessions, expected at least 1"),
        (engine.truncate("nobody", 0), "no session 'nobody', expected one that has generated"),
    ]:
        with pytest.raises(EngineError, match=message):
            await call
    for name in ["parent", *names, "nobody"]:
        await engine.release(name)
    assert engine.kv_budget.live_sequences == before.live_sequences - 1


@needs_vllm
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"top_p": 0.9}, "top_k is 0 and top_p 0.9, expected 0 and 1"),
        ({"top_k": 5}, "top_k is 5 and top_p 1.0, expected 0 and 1"),
        ({"temperature": 0.001}, "temperature is 0.001, expected 0 or 0.01 to 2"),
        ({"temperature": 2.5}, "temperature is 2.5, expected 0 or 0.01 to 2"),
    ],
)
async def test_sampling_that_would_bend_the_logprobs_is_refused(engine, sampling, message) -> None:
    with pytest.raises(EngineError, match=message):
        await generate(engine, prompt(5), **sampling)


@needs_vllm
async def test_greedy_calls_take_any_filter(engine, model) -> None:
    tokens, *_ = await generate(engine, prompt(9), 8, temperature=0.0, top_p=0.5, top_k=3)
    assert tokens == greedy(model, prompt(9), 8)


@needs_vllm
async def test_token_ids_outside_the_vocabulary_are_refused(engine) -> None:
    with pytest.raises(EngineError, match="token id 512 in the context, expected 0 to 511"):
        await generate(engine, [1, VOCAB])


@needs_vllm
async def test_new_weights_are_read_from_the_folder(engine, model, folder) -> None:
    ids = prompt(70, 8)
    version = engine.weight_version
    await generate(engine, ids, 5, session="warm")
    fresh = build_model(seed=1)
    try:
        fresh.save_pretrained(folder)
        across = asyncio.create_task(generate(engine, ids, 150, session="across"))
        await started(engine, "across", 75)
        await engine.update_weights(version + 1)
        assert engine.weight_version == version + 1
        tokens, logprobs, _, prefill = await generate(
            engine, ids, 30, session="warm", temperature=0.0
        )
        assert tokens == greedy(fresh, ids, 30)
        expected = truth(fresh, ids + tokens)[70:]
        np.testing.assert_allclose(logprobs, expected, atol=LOGPROB_TOLERANCE, rtol=0)
        assert prefill == 70
        # A call in flight ends under the new weights, its whole context computed with them.
        tokens, logprobs, *_ = await across
        expected = truth(fresh, ids + tokens)[-20:]
        np.testing.assert_allclose(logprobs[-20:], expected, atol=LOGPROB_TOLERANCE, rtol=0)
        with pytest.raises(EngineError, match="expected more than"):
            await engine.update_weights(version + 1)
    finally:
        model.save_pretrained(folder)
        await engine.update_weights(version + 2)
    tokens, *_ = await generate(engine, ids, 30, session="warm", temperature=0.0)
    assert tokens == greedy(model, ids, 30)


@needs_vllm
async def test_why_resumable_requests_are_not_used(engine) -> None:
    """A resumed chunk ignores its seed: whoever falls back to a request of its own says others."""
    from vllm import SamplingParams as VLLMParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    def parameters(seed: int):
        return VLLMParams(
            temperature=1.0,
            seed=seed,
            max_tokens=20,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    async def resumed(seed: int) -> tuple[list[int], list[int]]:
        """The context of the second chunk, and what is said to it."""
        chunks: asyncio.Queue[StreamingInput] = asyncio.Queue()

        async def inputs():
            while True:
                yield await chunks.get()

        context, said = list(PROMPT), []
        chunks.put_nowait(StreamingInput({"prompt_token_ids": list(PROMPT)}, parameters(11)))
        stream = engine._llm.generate(inputs(), parameters(11), f"resumable-{seed}")
        async with asyncio.timeout(60), aclosing(stream):
            async for output in stream:
                said += output.outputs[0].token_ids
                if output.outputs[0].finish_reason is not None and context == PROMPT:
                    # The last sampled token is dropped, and has to be sent again.
                    update = {"prompt_token_ids": [said[-1], 5, 6]}
                    chunks.put_nowait(StreamingInput(update, parameters(seed)))
                    context, said = [*context, *said, 5, 6], []
                elif output.outputs[0].finish_reason is not None:
                    break
        return context, said

    async def ordinary(context: list[int], seed: int) -> list[int]:
        prompt = {"prompt_token_ids": list(context)}
        outputs = engine._llm.generate(prompt, parameters(seed), f"ordinary-{seed}")
        return [token async for output in outputs for token in output.outputs[0].token_ids]

    (context, one), (same_context, other) = await resumed(22), await resumed(33)
    assert context == same_context
    assert await ordinary(context, 22) != await ordinary(context, 33)
    assert one == other
