"""A record answers for the sandbox, in order, and what differs from it is named."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script
from thor_fast.errors import DataError
from thor_fast.rollout import ObservationEncoder, RolloutLimits, run_episode
from thor_fast.rollout.backtrack import BacktrackPolicy
from thor_fast.rollout.replay import RecordedSandbox, Replayer, calls_in_order, first_difference
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Segment, Status, StopReason, TokenSource, ToolCall

from .reseeded_engine import ReseededEngine

PROMPT = (65, 66)
EOS = 1
BAD, GOOD = "```py\nbad\n```", "```py\ngood\n```"
RESULTS = {
    "bad\n": ExecutionResult(Status.ERROR, stderr="NameError: bad"),
    "good\n": ExecutionResult(Status.OK, "42"),
}
KEPT_BEST = BacktrackPolicy(l_suf=2, attempts_per_call=2, keep="best")


@pytest.fixture
def world(tokenizers, fake_sandbox):
    """Records an episode whose k-th text is written under its k-th seed; makes replayers of it."""
    tokenizer = tokenizers.bytes

    class World:
        tool = PythonTool(tokenizer)
        encode = ObservationEncoder(tokenizer)

        def engine(self, *texts, logprobs=()):
            ids = [tuple(tokenizer.encode(t).ids) for t in texts]
            each = logprobs or (-0.5,) * len(ids)
            scripts = [Script(i, (p,) * len(i)) for i, p in zip(ids, each, strict=True)]
            return ReseededEngine(PROMPT, scripts)

        def record(self, engine, *, backtrack=None, limits=None, sandbox=None):
            return run_episode(
                engine, sandbox or fake_sandbox(lambda c: RESULTS[c]), self.tool, PROMPT,
                limits or RolloutLimits(), encode=self.encode, sampling=SamplingParams(seed=7),
                eos_token_ids=frozenset({EOS}), session="s", backtrack=backtrack,
            )  # fmt: skip

        def replayer(self, engine, **options):
            options = {"limits": RolloutLimits(deadline_s=0.001), **options}
            return Replayer(
                engine, self.tool, self.encode, sampling=SamplingParams(),
                eos_token_ids=frozenset({EOS}), **options,
            )  # fmt: skip

    return World()


@pytest.mark.parametrize(
    ("texts", "policy", "logprobs"),
    [
        ([f"a\n{GOOD}b\n{BAD}42<|im_end|>"], None, ()),
        ([f"a\n{BAD}", f"b\n{GOOD}c\n{BAD}", "42<|im_end|>"], BacktrackPolicy(l_suf=2), ()),
        ([f"a\n{BAD}", f"b\n{BAD}", f"c\n{BAD}", "42<|im_end|>"], KEPT_BEST, (-2, -1, -3, -1)),
        ([f"a\n{BAD}", f"b\n{GOOD}<|im_end|>"], BacktrackPolicy(l_suf=2, hint=True), ()),
    ],
)
async def test_a_record_is_repeated_without_its_sandbox(world, texts, policy, logprobs) -> None:
    recorded = await world.record(world.engine(*texts, logprobs=logprobs), backtrack=policy)
    replayer = world.replayer(world.engine(*texts, logprobs=logprobs), backtrack=policy)
    again = await replayer.replay(recorded)
    assert first_difference(recorded, again) is None
    assert again == replace(recorded, metrics=again.metrics)
    assert replayer.engine.kv_budget.live_sequences == 0


async def test_calls_come_in_the_order_they_ran(world, fake_sandbox) -> None:
    sandbox = fake_sandbox(lambda c: RESULTS[c])
    texts = [f"a\n{BAD}", f"b\n{BAD}", f"c\n{BAD}", f"d\n{GOOD}<|im_end|>"]
    engine = world.engine(*texts, logprobs=(-2, -1, -3, -1))
    recorded = await world.record(engine, backtrack=KEPT_BEST, sandbox=sandbox)
    calls = calls_in_order(recorded)
    assert [c.code for c in calls] == [r.code for r in sandbox.requests]
    assert [c.attempt for c in calls] == [0, 1, 2, 0]
    assert len({id(c) for c in calls}) == 4


async def test_other_code_than_recorded_is_named(world) -> None:
    recorded = await world.record(world.engine(f"{GOOD}{GOOD}<|im_end|>"))
    replayer = world.replayer(world.engine(f"{GOOD}{BAD}<|im_end|>"))
    with pytest.raises(DataError, match=r"call 2 runs 'bad\\n', expected 'good\\n' as in the"):
        await replayer.replay(recorded)
    assert replayer.engine.kv_budget.live_sequences == 0


async def test_what_the_record_does_not_have_is_infrastructure(world) -> None:
    recorded = await world.record(world.engine(f"{GOOD}<|im_end|>"))
    again = await world.replayer(world.engine(f"{GOOD}{GOOD}")).replay(recorded)
    assert again.stop_reason is StopReason.TOOL_FAILURE
    assert again.error == "the record has 1 calls, and this is number 2"


async def test_weights_of_another_version_are_refused(world) -> None:
    recorded = await world.record(world.engine("x<|im_end|>"))
    engine = world.engine("x<|im_end|>")
    await engine.update_weights(3)
    with pytest.raises(DataError, match="weights of version 3, expected 0, which sampled"):
        await world.replayer(engine).replay(recorded)


async def test_what_a_clock_has_ended_is_replayed_as_far_as_it_came(
    world, fake_sandbox, until
) -> None:
    text = f"{GOOD}b\n{BAD}never"
    limits = RolloutLimits(deadline_s=1)

    class Hangs(fake_sandbox):
        async def submit(self, request):
            self.delay_s = 60.0 if request.code == "bad\n" else 0.0
            return await super().submit(request)

    sandbox = Hangs(lambda c: RESULTS[c])
    recorded = await world.record(world.engine(text), limits=limits, sandbox=sandbox)
    assert (recorded.stop_reason, recorded.tool_calls[1].result) == (StopReason.DEADLINE, None)
    again = await world.replayer(world.engine(text)).replay(recorded)
    assert again.stop_reason is StopReason.TOOL_FAILURE
    assert first_difference(recorded, again) is None
    recorded.truncate(len(PROMPT) + 1)  # as if while sampling
    recorded.stop_reason = StopReason.CANCELLED
    again = await world.replayer(world.engine(text)).replay(recorded)
    assert first_difference(recorded, again) is None
    assert len(again) == len(recorded)


async def test_again_from_each_step(world, fake_sandbox) -> None:
    texts = [f"a\n{BAD}", f"b\n{GOOD}c\n{GOOD}", "unused"]
    policy = BacktrackPolicy(l_suf=2)
    recorded = await world.record(world.engine(*texts), backtrack=policy)
    assert recorded.error  # its script ends here, without an EOS
    second = recorded.tool_calls[1]
    for at_token, said in [(second.start - 1, f"\n{GOOD}"), (second.end - 4, "\n```")]:
        engine = world.engine(said)
        engine._scripts[tuple(recorded.token_ids[:at_token])] = engine._scripts.pop(PROMPT)
        again = await world.replayer(engine, backtrack=policy).rerun(recorded, at_token)
        assert first_difference(recorded, again) is None
        assert len(again.attempts) == 1
        assert engine.seeds[0] == recorded.seed_at(at_token) != recorded.seed
    again = await world.replayer(world.engine(""), backtrack=policy).rerun(recorded, second.end)
    assert first_difference(recorded, again) is None
    assert again.tool_calls == recorded.tool_calls  # the last was answered from the record
    live = fake_sandbox(lambda _: ExecutionResult(Status.OK, "43"))
    engine = world.engine("x<|im_end|>")
    context = (*recorded.token_ids[: second.end], *world.encode("\n```output\n43\n```\n"))
    engine._scripts[context] = engine._scripts.pop(PROMPT)
    again = await world.replayer(engine).rerun(recorded, second.end, sandbox=live, seed=99)
    assert [r.code for r in live.requests] == ["good\n"]
    assert again.tool_calls[1].result.stdout == "43"
    assert recorded.tool_calls[1].result.stdout == "42"
    assert again.token_ids[: second.end] == recorded.token_ids[: second.end]
    assert (engine.seeds, again.seed_at(second.end)) == ([99], 99)
    assert again.stop_reason is StopReason.EOS


async def test_positions_where_nothing_can_begin(world) -> None:
    recorded = await world.record(world.engine(f"{GOOD}x<|im_end|>"))
    replayer = world.replayer(world.engine("x"))
    inside = recorded.tool_calls[0].end + 3
    with pytest.raises(DataError, match=f"at_token is {inside}, where the record has no token of"):
        await replayer.rerun(recorded, inside)
    with pytest.raises(DataError, match="truncate to 1 tokens, expected 2"):
        await replayer.rerun(recorded, 1)


async def test_differences_have_names(world) -> None:
    texts = [f"a\n{BAD}", f"b\n{GOOD}x<|im_end|>"]
    one = await world.record(world.engine(*texts), backtrack=BacktrackPolicy(l_suf=2))

    def changed(**values):
        return first_difference(one, replace(one, **values))

    model, tool, rest = one.segments
    assert changed() is None
    assert changed(metrics={}, reward=1.0, weight_version=9) is None
    assert changed(prompt_ids=(65, 67)) == "token 1 is 67, expected 66"
    assert changed(segments=[model, tool]).endswith(f"tokens, expected {len(one)}")
    other = replace(rest, source=TokenSource.TOOL, logprobs=None)
    assert changed(segments=[model, tool, other]) == "the same tokens are from other sources"
    other = replace(rest, logprobs=(-0.5, -0.75))
    where = len(one) - 1
    assert changed(segments=[model, tool, other]) == f"log-prob of token {where} differs by 0.25"
    near = replace(one, segments=[model, tool, other])
    assert first_difference(one, near, logprob_tolerance=0.25) is None
    assert changed(seed=8) == changed(reseeded=[]) == "the same tokens are drawn from other seeds"
    assert changed(attempts=[]) == "0 attempts, expected 1"
    (attempt,) = one.attempts
    assert changed(attempts=[replace(attempt, hint=1)]) == "attempt 0 differs"
    gone = (Segment(TokenSource.MODEL, (5,), (-0.5,)),)
    assert changed(attempts=[replace(attempt, segments=gone)]).startswith("attempt 0: token 0 is 5")
    assert changed(tool_calls=[]) == "tool_calls differ"
    assert changed(stop_reason=StopReason.MAX_TOKENS).startswith("ended with StopReason.MAX_TOKENS")
    nan = replace(rest, logprobs=(-0.5, float("nan")))
    assert "differs by nan" in changed(segments=[model, tool, nan])


def test_the_recorded_sandbox_is_a_sandbox() -> None:
    calls = [ToolCall("a", 0, 1, RESULTS["good\n"]), ToolCall("b", 1, 2)]
    with RecordedSandbox(calls) as sandbox:
        assert isinstance(sandbox, Sandbox)
        ok, lost = sandbox.execute_batch(["a", "b"])
        assert ok is RESULTS["good\n"]
        assert (lost.status, lost.error) == (Status.INFRA, "the record has no result of call 2")
        assert asyncio.run(sandbox.submit("c")).status is Status.INFRA
