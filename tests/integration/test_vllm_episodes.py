"""Whole episodes through vLLM: the tiny policy, real snippets, every token accounted for."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from thor_fast.engines.base import GenerateRequest, SamplingParams
from thor_fast.engines.openai import OpenAIEngine
from thor_fast.engines.paged import PagedEngine
from thor_fast.engines.vllm import VLLMEngine
from thor_fast.errors import EngineError
from thor_fast.rollout import (
    BacktrackPolicy,
    ObservationEncoder,
    Renderer,
    RolloutLimits,
    run_episode,
)
from thor_fast.sandbox import NativeSandbox
from thor_fast.synthetic import (
    HELD_OUT_FAMILIES,
    TEST_SEED,
    TRAINED_FAMILIES,
    load_tiny_policy,
    task_set,
    tiny_policy_path,
)
from thor_fast.tools import PythonTool, closing_fence_tokens
from thor_fast.types import StopReason

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="needs vllm: pip install 'thor_fast[vllm]'",
    ),
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    # Importing and running vLLM raises warnings of its own.
    pytest.mark.filterwarnings("ignore"),
]

MAX_CONTEXT = 512
# vLLM's float32 kernels against one plain forward by transformers; measured: 1.4e-5 at
# most.
LOGPROB_TOLERANCE = 5e-5


class Recording:
    """An engine that keeps what it was asked and what it sampled."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self.calls: list[tuple[GenerateRequest, list[int]]] = []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    async def generate(self, request):
        sampled: list[int] = []
        self.calls.append((request, sampled))
        stream = self._engine.generate(request)
        try:
            async for chunk in stream:
                sampled += chunk.token_ids
                yield chunk
        finally:
            await stream.aclose()


@pytest.fixture(scope="module")
def policy():
    return load_tiny_policy()


@pytest.fixture(scope="module")
def sandbox():
    with NativeSandbox() as sandbox:
        yield sandbox


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(vllm_environment, policy):
    engine = VLLMEngine.from_pretrained(
        tiny_policy_path(),
        max_sequences=8,
        max_context=MAX_CONTEXT,
        dtype=torch.float32,
        pause_token_ids=closing_fence_tokens(policy[1]),
        splice_kv=True,
        enforce_eager=True,
        block_size=32,
    )
    yield engine
    await engine.aclose()


@pytest.fixture(scope="module")
def episodes(policy, sandbox):
    """Runs one episode per task, eight at a time."""
    _, tokenizer = policy
    render, tool, encode = Renderer(tokenizer), PythonTool(tokenizer), ObservationEncoder(tokenizer)
    slots = asyncio.Semaphore(8)

    async def one(engine, index, task, sampling, backtrack):
        async with slots:
            return await run_episode(
                engine,
                sandbox,
                tool,
                render.prompt(task.prompt),
                RolloutLimits(),
                encode=encode,
                sampling=replace(sampling, seed=index),
                eos_token_ids=frozenset({tokenizer.eos_token_id}),
                session=f"e{index}",
                backtrack=backtrack,
            )

    async def run(engine, n_tasks, families=TRAINED_FAMILIES, backtrack=None, **sampling):
        tasks = task_set(n_tasks, TEST_SEED, families)
        params = SamplingParams(**sampling)
        return await asyncio.gather(
            *(one(engine, i, task, params, backtrack) for i, task in enumerate(tasks))
        )

    return run


def same(got, expected) -> None:
    """Two sets of trajectories, token for token."""
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.stop_reason is theirs.stop_reason
        assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()
        np.testing.assert_allclose(
            ours.sampling_logprobs, theirs.sampling_logprobs, atol=LOGPROB_TOLERANCE, rtol=0
        )
    assert sum(len(t.tool_calls) for t in got) >= 16


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded(policy, episodes):
    """Greedy trajectories of the embedded engine."""
    engine = PagedEngine(policy[0], max_sequences=8, max_context=MAX_CONTEXT)
    try:
        return await episodes(engine, 16, temperature=0.0)
    finally:
        await engine.aclose()


async def test_greedy_trajectories_are_those_of_the_embedded_engine(
    engine, embedded, episodes
) -> None:
    got = await episodes(engine, 16, temperature=0.0)
    same(got, embedded)
    for trajectory in got:
        # Stopped in the core at every closing fence, and each block of KV copied: nothing was
        # sampled in vain, and a resume computed the observation and the token before it.
        assert trajectory.metrics["dropped_tokens"] == 0
        observed = len(trajectory) - len(trajectory.prompt_ids) - int(trajectory.loss_mask.sum())
        resumes = trajectory.metrics["engine_calls"] - 1
        assert trajectory.metrics["resume_prefill_tokens"] == observed + resumes


async def test_failed_calls_are_rolled_back_as_in_the_embedded_engine(
    engine, policy, episodes
) -> None:
    """Greedy retries differ by the hint, so both engines must take the same way round."""
    correct = BacktrackPolicy(l_suf=8, hint=True, attempts_per_call=2)
    options = {"families": HELD_OUT_FAMILIES, "backtrack": correct, "temperature": 0.0}
    embedded = PagedEngine(policy[0], max_sequences=8, max_context=MAX_CONTEXT)
    try:
        expected = await episodes(embedded, 24, **options)
    finally:
        await embedded.aclose()
    got = await episodes(engine, 24, **options)
    same(got, expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert [a.cut for a in ours.attempts] == [a.cut for a in theirs.attempts]
        assert [[s.token_ids for s in a.segments] for a in ours.attempts] == [
            [s.token_ids for s in a.segments] for a in theirs.attempts
        ]
    assert sum(len(t.attempts) for t in got) >= 4


@pytest.fixture(scope="module")
def server(vllm_environment, tmp_path_factory):
    """The base URL of vLLM's own server, in a process group of its own."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("serve_vllm_cpu.py")
    log = tmp_path_factory.mktemp("server") / "log"
    options = {
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": MAX_CONTEXT,
        "max-num-seqs": 8,
        "block-size": 32,
        "logprobs-mode": "processed_logprobs",
    }
    command = [sys.executable, script, "serve", tiny_policy_path(), "--enforce-eager"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


async def test_greedy_trajectories_over_http_are_the_same(
    server, embedded, policy, episodes
) -> None:
    engine = OpenAIEngine(
        server,
        model="tiny",
        max_sequences=8,
        max_context=MAX_CONTEXT,
        pause_token_ids=closing_fence_tokens(policy[1]),
        processed_logprobs=True,
    )
    try:
        got = await episodes(engine, 16, temperature=0.0)
        same(got, embedded)
        assert all(t.metrics["dropped_tokens"] == 0 for t in got)
        sampled, again = [await episodes(engine, 2, temperature=0.7) for _ in range(2)]
        assert [t.token_ids for t in sampled] == [t.token_ids for t in again]
        request = GenerateRequest((5, 700_000), "wrong", 3)
        with pytest.raises(EngineError, match="Token id 700000 is out of vocabulary"):
            [chunk async for chunk in engine.generate(request)]
    finally:
        await engine.aclose()


async def test_sampled_episodes_keep_every_token(engine, policy, episodes) -> None:
    model, _ = policy
    recording = Recording(engine)
    trajectories = await episodes(recording, 16, temperature=1.0)
    assert max(len(t.tool_calls) for t in trajectories) >= 2
    for index, trajectory in enumerate(trajectories):
        assert trajectory.stop_reason in (StopReason.EOS, StopReason.MAX_CONTEXT), trajectory.error
        ids, mask = trajectory.token_ids, trajectory.loss_mask
        calls = [c for c in recording.calls if c[0].session == f"e{index}"]
        assert len(calls) == trajectory.metrics["engine_calls"] == len(trajectory.tool_calls) + 1
        for request, sampled in calls:
            start = len(request.token_ids)
            end = start + int(np.cumprod(mask[start:]).sum())
            assert list(request.token_ids) == ids[:start]
            assert sampled[: end - start] == ids[start:end]
        n_sampled = sum(len(sampled) for _, sampled in calls)
        assert n_sampled == mask.sum()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])
        expected = np.concatenate(([0.0], chosen[:, 0].numpy())) * mask
        np.testing.assert_allclose(
            trajectory.sampling_logprobs, expected, atol=LOGPROB_TOLERANCE, rtol=0
        )


async def test_an_episode_is_the_same_alone_and_in_a_crowd(engine, episodes) -> None:
    crowd = await episodes(engine, 8, temperature=1.0)
    (alone,) = await episodes(engine, 1, temperature=1.0)
    assert alone.token_ids == crowd[0].token_ids


async def test_episodes_leave_nothing_behind(engine, episodes) -> None:
    await episodes(engine, 8, temperature=1.0)
    assert engine.kv_budget.live_sequences == 0
    assert engine._llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(30):
        # True only if no request and no pin holds a block.
        while not await engine._llm.reset_prefix_cache(reset_connector=True):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_close_fails_streams_in_flight_and_later_calls(engine) -> None:
    """The last test here: it takes the engine with it."""

    async def drain(session: str) -> None:
        request = GenerateRequest((5, 6, 7), session, 400)
        async for _ in engine.generate(request):
            started.set()

    started = asyncio.Event()
    tasks = [asyncio.create_task(drain(f"s{i}")) for i in range(4)]
    await started.wait()
    # This one is on its way to vLLM at most.
    tasks.append(asyncio.create_task(drain("late")))
    await asyncio.sleep(0)
    await engine.aclose()
    for task in tasks:
        with pytest.raises(EngineError, match="the engine is closed"):
            await task
    with pytest.raises(EngineError, match="the engine is closed"):
        await drain("later")
    with pytest.raises(EngineError, match="the engine is closed"):
        await engine.update_weights(1)
    await engine.release("s0")
    await engine.aclose()
