"""One episode: what it records, and that each way it can end is a stop reason."""

from __future__ import annotations

import asyncio

import pytest

from thor_fast.engines.base import FinishReason, SamplingParams, TokenChunk
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.errors import DataError, SandboxError
from thor_fast.rollout import ObservationEncoder, Renderer, RolloutLimits, run_episode
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Status, StopReason, TokenSource, Trajectory

CALL = "so\n```python\nprint(6*7)\n```"
OBSERVATION = "\n```output\n42\n```\n"
PROMPT = (65, 66)
EOS = 1


@pytest.fixture
def episode(tokenizers, fake_sandbox):
    """Runs one; ``text`` is what the model writes, one token per byte, EOS as <|im_end|>."""
    tokenizer = tokenizers.bytes

    def run(text: str = "", *, engine=None, sandbox=None, limits=None, script=None, **options):
        ids = tuple(tokenizer.encode(text).ids)
        if engine is None:
            engine = ScriptedEngine({PROMPT: [script or Script(ids)]}, **options)
        return run_episode(
            engine,
            sandbox or fake_sandbox(),
            PythonTool(tokenizer),
            PROMPT,
            limits or RolloutLimits(),
            encode=ObservationEncoder(tokenizer),
            sampling=SamplingParams(seed=7),
            eos_token_ids=frozenset({EOS}),
            session="s",
        )

    run.text = Renderer(tokenizer).text
    run.ids = lambda text: tokenizer.encode(text).ids
    return run


async def test_a_call_is_run_and_answered(episode) -> None:
    t = await episode(CALL + "42<|im_end|>")
    assert t.stop_reason is StopReason.EOS
    assert episode.text(t.response_ids) == CALL + OBSERVATION + "42<|im_end|>"
    assert [s.source for s in t.segments] == [
        TokenSource.MODEL, TokenSource.TOOL, TokenSource.MODEL,
    ]  # fmt: skip
    (call,) = t.tool_calls
    assert (call.code, call.passed, call.observation) == ("print(6*7)\n", True, OBSERVATION)
    assert episode.text(t.token_ids[call.start : call.end]) == CALL[3:]
    assert (t.seed, t.weight_version, t.error, t.reward) == (7, 0, "", None)


async def test_metrics(episode) -> None:
    t = await episode(CALL + "42<|im_end|>")
    assert t.metrics["engine_calls"] == 2
    assert t.metrics["prefill_tokens"] == len(PROMPT) + len(OBSERVATION)
    assert t.metrics["resume_prefill_tokens"] == len(OBSERVATION)
    assert t.metrics["dropped_tokens"] == 0
    assert 0 < t.metrics["tool_wait_s"] <= t.metrics["tool_s"]
    assert t.metrics["generate_s"] > 0


@pytest.mark.parametrize(("watch", "chunk"), [(True, 1), (True, 7), (False, 1), (False, 7)])
async def test_two_calls_whether_the_engine_watches_or_not(episode, watch, chunk) -> None:
    text = CALL + "and" + CALL + "84<|im_end|>"
    t = await episode(text, watch=watch, chunk_tokens=chunk)
    answered = CALL + OBSERVATION
    assert episode.text(t.response_ids) == f"{answered}and{answered}84<|im_end|>"
    assert [c.code for c in t.tool_calls] == ["print(6*7)\n"] * 2
    assert t.metrics["engine_calls"] == 3
    assert (t.metrics["dropped_tokens"] > 0) == (not watch and chunk == 7)


async def test_what_ran_past_the_fence_is_forgotten_by_the_engine(episode) -> None:
    cuts: list[int] = []

    class Recording(ScriptedEngine):
        async def truncate(self, session: str, at_token: int) -> None:
            cuts.append(at_token)
            await super().truncate(session, at_token)

    script = Script(tuple(episode.ids(CALL + "tail<|im_end|>")))
    engine = Recording({PROMPT: [script]}, watch=False, chunk_tokens=64)
    t = await episode(engine=engine)
    # The tail was sampled once too early, dropped, and sampled again behind the observation.
    assert t.metrics["dropped_tokens"] == len("tail") + 1
    assert cuts == [len(PROMPT) + len(CALL)]
    assert episode.text(t.response_ids) == CALL + OBSERVATION + "tail<|im_end|>"


async def test_the_stream_is_closed_before_the_snippet_runs(episode, fake_sandbox) -> None:
    streams = []

    class Recording(ScriptedEngine):
        def generate(self, request):
            streams.append(super().generate(request))
            return streams[-1]

    def run(_: str) -> ExecutionResult:
        assert streams[-1].ag_frame is None  # finished, so the engine may not sample on
        return ExecutionResult(Status.OK)

    script = Script(tuple(episode.ids(CALL + "tail<|im_end|>")))
    engine = Recording({PROMPT: [script]}, watch=False)
    t = await episode(engine=engine, sandbox=fake_sandbox(run))
    assert (t.stop_reason, len(streams)) == (StopReason.EOS, 2)


async def test_a_call_may_follow_an_observation_at_once(episode) -> None:
    t = await episode(CALL + CALL[3:] + "84<|im_end|>")
    assert len(t.tool_calls) == 2
    assert episode.text(t.token_ids[t.tool_calls[1].start : t.tool_calls[1].end]) == CALL[3:]


async def test_a_failed_call_goes_on(episode, fake_sandbox) -> None:
    failed = ExecutionResult(Status.ERROR, stderr="NameError: x", exit_code=1)
    t = await episode(CALL + "hm<|im_end|>", sandbox=fake_sandbox(lambda _: failed))
    assert t.stop_reason is StopReason.EOS
    assert t.tool_calls[0].passed is False
    assert "NameError: x" in t.tool_calls[0].observation


async def test_an_unclosed_block_never_runs(episode, fake_sandbox) -> None:
    sandbox = fake_sandbox()
    t = await episode("```python\nprint(1)\n<|im_end|>", sandbox=sandbox)
    assert (t.stop_reason, t.tool_calls, sandbox.requests) == (StopReason.EOS, [], [])


async def test_max_tokens(episode) -> None:
    t = await episode("x" * 50, limits=RolloutLimits(max_response_tokens=9))
    assert (t.stop_reason, len(t.response_ids)) == (StopReason.MAX_TOKENS, 9)


async def test_max_tokens_counts_observations(episode) -> None:
    limits = RolloutLimits(max_response_tokens=len(CALL) + len(OBSERVATION))
    t = await episode(CALL + "never", limits=limits)
    assert t.stop_reason is StopReason.MAX_TOKENS
    assert episode.text(t.response_ids) == CALL + OBSERVATION


async def test_observation_overflow_ran_but_was_not_appended(episode) -> None:
    limits = RolloutLimits(max_response_tokens=len(CALL) + len(OBSERVATION) - 1)
    t = await episode(CALL + "never", limits=limits)
    assert t.stop_reason is StopReason.OBSERVATION_OVERFLOW
    assert episode.text(t.response_ids) == CALL
    assert (t.tool_calls[0].passed, t.tool_calls[0].observation) == (True, "")


async def test_observation_overflow_of_the_context(episode) -> None:
    t = await episode(CALL + "never", max_context=len(PROMPT) + len(CALL) + 5)
    assert t.stop_reason is StopReason.OBSERVATION_OVERFLOW


async def test_max_context(episode) -> None:
    t = await episode("x" * 50, max_context=10)
    assert (t.stop_reason, len(t)) == (StopReason.MAX_CONTEXT, 10)


async def test_a_prompt_that_fills_the_context(episode) -> None:
    t = await episode("x", max_context=2)
    assert (t.stop_reason, t.segments) == (StopReason.MAX_CONTEXT, [])


async def test_max_tool_calls(episode, fake_sandbox) -> None:
    sandbox = fake_sandbox()
    limits = RolloutLimits(max_tool_calls=1)
    t = await episode(CALL + CALL + "never", limits=limits, sandbox=sandbox)
    assert t.stop_reason is StopReason.MAX_TOOL_CALLS
    assert len(sandbox.requests) == 1
    assert [c.passed for c in t.tool_calls] == [True, None]
    assert t.segments[-1].source is TokenSource.MODEL


async def test_deadline_while_the_snippet_runs(episode, fake_sandbox) -> None:
    sandbox = fake_sandbox(delay_s=30)
    t = await episode(CALL, limits=RolloutLimits(deadline_s=1), sandbox=sandbox)
    assert t.stop_reason is StopReason.DEADLINE
    assert (sandbox.cancelled, sandbox.running) == (1, 0)
    assert t.tool_calls[0].result is None
    assert episode.text(t.response_ids) == CALL
    assert 0 < t.metrics["tool_s"] < 30


async def test_deadline_while_sampling_keeps_what_came(episode) -> None:
    t = await episode("x" * 1000, limits=RolloutLimits(deadline_s=1), token_s=0.1)
    assert t.stop_reason is StopReason.DEADLINE
    assert 0 < len(t.response_ids) < 20
    assert set(t.loss_mask[len(PROMPT) :]) == {1}


async def test_infrastructure_failure_of_the_sandbox(episode, fake_sandbox) -> None:
    infra = ExecutionResult(Status.INFRA, error="clone: EAGAIN")
    t = await episode(CALL + "never", sandbox=fake_sandbox(lambda _: infra))
    assert (t.stop_reason, t.error) == (StopReason.TOOL_FAILURE, "clone: EAGAIN")
    assert t.tool_calls[0].passed is None
    assert episode.text(t.response_ids) == CALL


async def test_engine_failure_keeps_what_came(episode) -> None:
    ids = tuple(episode.ids("abcdef"))
    t = await episode(script=Script(ids, fail_at=4))
    assert t.stop_reason is StopReason.ENGINE_FAILURE
    assert t.error.startswith("EngineError: script says to fail at token 4")
    assert episode.text(t.response_ids) == "abcd"


class _Faulty(ScriptedEngine):
    """Ends its streams in ways the contract does not allow."""

    def __init__(self, last: TokenChunk | None) -> None:
        super().__init__({PROMPT: [Script((5,))]})
        self._last = last

    async def generate(self, request):
        if self._last is not None:
            yield self._last


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (None, "after 0 tokens with None"),
        (TokenChunk((5,), (-0.5,)), "after 1 tokens with None"),
        (TokenChunk((), (), FinishReason.LENGTH), "after 0 tokens with FinishReason.LENGTH"),
        (TokenChunk((5,), (-0.5,), FinishReason.WATCH), "after 1 tokens with FinishReason.WATCH"),
    ],
)
async def test_an_engine_that_breaks_its_contract_is_an_engine_failure(
    episode, last, message
) -> None:
    t = await asyncio.wait_for(episode(engine=_Faulty(last)), 5)
    assert t.stop_reason is StopReason.ENGINE_FAILURE
    assert message in t.error


async def test_a_call_whose_tokens_never_came_is_an_engine_failure(episode, fake_sandbox) -> None:
    class Forgetful(ScriptedEngine):
        async def generate(self, request):
            for token_id in episode.ids(CALL):
                request.watch(token_id)
            yield TokenChunk((5,), (-0.5,), FinishReason.WATCH)

    sandbox = fake_sandbox()
    t = await episode(engine=Forgetful({}), sandbox=sandbox)
    assert (t.stop_reason, t.tool_calls) == (StopReason.ENGINE_FAILURE, [])
    assert sandbox.requests == []


async def test_cancellation_is_visible_and_raised(tokenizers, fake_sandbox, until) -> None:
    tokenizer = tokenizers.bytes
    sandbox = fake_sandbox(delay_s=30)
    engine = ScriptedEngine({PROMPT: [Script(tuple(tokenizer.encode(CALL).ids))]})
    trajectory = Trajectory(PROMPT)
    task = asyncio.create_task(
        run_episode(
            engine, sandbox, PythonTool(tokenizer), PROMPT, RolloutLimits(),
            encode=ObservationEncoder(tokenizer), sampling=SamplingParams(),
            eos_token_ids=frozenset({EOS}), session="s", trajectory=trajectory,
        )
    )  # fmt: skip
    await until(lambda: sandbox.running)
    assert engine.kv_budget.live_sequences == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trajectory.stop_reason is StopReason.CANCELLED
    assert len(trajectory.response_ids) == len(CALL)
    assert (sandbox.cancelled, engine.kv_budget.live_sequences) == (1, 0)


async def test_the_session_is_released_whatever_the_end(episode, fake_sandbox) -> None:
    infra = ExecutionResult(Status.INFRA, error="x")
    scripts = {
        "eos": (Script((EOS,)), None),
        "failure": (Script((5,), fail_at=0), None),
        "infra": (Script(tuple(episode.ids(CALL))), fake_sandbox(lambda _: infra)),
    }
    for script, sandbox in scripts.values():
        engine = ScriptedEngine({PROMPT: [script]})
        await episode(engine=engine, sandbox=sandbox)
        assert engine.kv_budget.live_sequences == 0


async def test_misuse_and_bugs_come_out(episode, fake_sandbox) -> None:
    def closed(_: str) -> ExecutionResult:
        raise SandboxError("sandbox is closed, expected an open one")

    engine = ScriptedEngine({PROMPT: [Script(tuple(episode.ids(CALL)))]})
    with pytest.raises(SandboxError, match="sandbox is closed"):
        await episode(engine=engine, sandbox=fake_sandbox(closed))
    assert engine.kv_budget.live_sequences == 0

    def late(_: str) -> ExecutionResult:
        raise TimeoutError("not ours")

    with pytest.raises(TimeoutError, match="not ours"):
        await episode(CALL, sandbox=fake_sandbox(late), limits=RolloutLimits(deadline_s=60))


async def test_a_used_trajectory_cannot_be_filled(tokenizers, fake_sandbox) -> None:
    with pytest.raises(DataError, match=r"a prompt of 3 tokens .* expected the 2 tokens of"):
        await run_episode(
            ScriptedEngine({}), fake_sandbox(), PythonTool(tokenizers.bytes), PROMPT,
            RolloutLimits(), encode=list, sampling=SamplingParams(),
            eos_token_ids=frozenset({EOS}), session="s", trajectory=Trajectory((1, 2, 3)),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_response_tokens": 0}, "max_response_tokens is 0, expected >= 1"),
        ({"max_tool_calls": -1}, "max_tool_calls is -1, expected >= 0"),
        ({"deadline_s": 0.0}, "deadline_s is 0.0, expected > 0 or None"),
        ({"deadline_s": float("nan")}, "deadline_s is nan, expected > 0"),
    ],
)
def test_limits_out_of_range(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutLimits(**values)
