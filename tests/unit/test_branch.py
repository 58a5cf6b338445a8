"""Step groups: which calls, from where, on which seeds, and that nothing is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.errors import ConfigError
from thor_fast.rollout import ObservationEncoder, Prompt, RolloutLimits, RolloutScheduler
from thor_fast.rollout.branch import BranchPolicy, branch_failed_steps, failed_calls
from thor_fast.tools import PythonTool
from thor_fast.types import (
    ExecutionResult,
    RolloutGroup,
    Segment,
    Status,
    StopReason,
    TokenSource,
    ToolCall,
    Trajectory,
)

EOS = 1
PROMPT = (65, 66)
BAD, GOOD = "```py\nbad\n```", "```py\nprint(42)\n```"
RESULTS = {
    "bad\n": ExecutionResult(Status.ERROR, stderr="NameError: bad"),
    "print(42)\n": ExecutionResult(Status.OK, "42"),
    "broken\n": ExecutionResult(Status.INFRA, error="clone: EAGAIN"),
}


@pytest.fixture
def setup(tokenizers, fake_sandbox):
    tokenizer = tokenizers.bytes

    class Setup:
        ids = staticmethod(lambda text: tuple(tokenizer.encode(text).ids))
        tool = PythonTool(tokenizer)
        encode = ObservationEncoder(tokenizer)
        limits = RolloutLimits()
        sampling = SamplingParams(seed=5)
        sandbox = staticmethod(lambda **options: fake_sandbox(lambda c: RESULTS[c], **options))

        def script(self, text: str, *, eos: bool = True) -> Script:
            return Script((*self.ids(text), *[EOS] * eos))

        async def roll_out(self, texts: list[str], sandbox) -> list[RolloutGroup]:
            engine = ScriptedEngine({PROMPT: [self.script(t) for t in texts]})
            scheduler = RolloutScheduler(
                engine, sandbox, self.tool, encode=self.encode, limits=self.limits,
                sampling=self.sampling, eos_token_ids=frozenset({EOS}), group_size=len(texts),
            )  # fmt: skip
            return await scheduler.run([Prompt(PROMPT, task_id="t")])

        def branch(self, engine, sandbox, groups, policy, **options):
            options = {"limits": self.limits, "sampling": self.sampling, **options}
            return branch_failed_steps(
                engine, sandbox, self.tool, groups, policy, encode=self.encode,
                eos_token_ids=frozenset({EOS}), **options,
            )  # fmt: skip

    return Setup()


async def test_continuations_of_one_block_from_before_the_failed_one(setup) -> None:
    sandbox = setup.sandbox()
    (group,) = groups = await setup.roll_out([f"first\n{GOOD}then the\n{BAD}so 42"], sandbox)
    (parent,) = group.trajectories
    failed = parent.tool_calls[1]
    prefix = tuple(parent.token_ids[: failed.start - 5])
    says = [f"the\n{GOOD}never said", f"the\n{BAD}never said", "no", "\n```py\nopen", f"\n{GOOD}"]
    engine = ScriptedEngine({prefix: [setup.script(s) for s in says]}, token_s=0.001)
    (step,) = await setup.branch(engine, sandbox, groups, BranchPolicy(l_suf=5, group_size=5))
    assert (step.parent, step.call_index, step.prefix_ids) == (parent, 1, prefix)
    assert step.rewards == [1.0, 0.0, 0.0, 0.0, 1.0]
    done, eos = StopReason.CALL_DONE, StopReason.EOS
    assert [t.stop_reason for t in step.continuations] == [done, done, eos, eos, done]
    wrote = [f"the\n{GOOD}", f"the\n{BAD}", "no", "\n```py\nopen", f"\n{GOOD}"]
    for t, text in zip(step.continuations, wrote, strict=True):
        assert t.prompt_ids == prefix
        assert t.token_ids[len(prefix) :][: len(text)] == list(setup.ids(text))
        assert t.loss_mask.tolist() == [0] * len(prefix) + [1] * len(t.response_ids)
        assert (t.sampling_logprobs[len(prefix) :] < 0).all()
        assert (t.reward, t.attempts, t.reseeded) == (None, [], [])
        for call in t.tool_calls:
            block = t.token_ids[call.start : call.end]
            assert tuple(block) in (setup.ids(GOOD), setup.ids(BAD))
            assert call.end == len(t)
    assert engine.kv_budget.live_sequences == 0


async def test_the_detector_knows_the_turn_that_the_prefix_ends_in(setup) -> None:
    """A fence begun in the prefix is completed; one quoted in another block is no call."""
    groups = [RolloutGroup(PROMPT, [Trajectory(PROMPT, seed=9)])]
    (parent,) = groups[0].trajectories
    text = f"```output\nquote\n```\n``{BAD}"
    start = len(PROMPT) + len(text) - len(BAD)
    parent.append(Segment(TokenSource.MODEL, setup.ids(text), (-1.0,) * len(text)))
    parent.tool_calls = [ToolCall("bad\n", start, len(parent), RESULTS["bad\n"])]
    for l_suf, said, passed in [
        (0, "`py\nprint(42)\n```", 1.0),
        (9, "```py\nprint(42)\n```\n```\n", 0.0),
    ]:
        prefix = tuple(parent.token_ids[: start - l_suf])
        engine = ScriptedEngine({prefix: [setup.script(said)]})
        policy = BranchPolicy(l_suf=l_suf, group_size=1)
        (step,) = await setup.branch(engine, setup.sandbox(), groups, policy)
        assert step.rewards == [passed]
        if passed:  # its first backticks lie in the prefix
            assert step.continuations[0].tool_calls[0].start == len(prefix) - 2


def _parents(*outcomes: str) -> list[RolloutGroup]:
    """One trajectory per string: a call for each letter, +, - or 0 for INFRA, . for never ran."""
    results = {
        "+": RESULTS["print(42)\n"],
        "-": RESULTS["bad\n"],
        "0": RESULTS["broken\n"],
        ".": None,
    }
    trajectories = []
    for seed, outcome in enumerate(outcomes):
        t = Trajectory(PROMPT, seed=seed)
        for letter in outcome:
            t.append(Segment(TokenSource.MODEL, (5, 6), (-1.0, -1.0)))
            t.tool_calls.append(ToolCall("x", len(t) - 1, len(t), results[letter]))
            t.append(Segment(TokenSource.TOOL, (7,)))
        trajectories.append(t)
    return [RolloutGroup(PROMPT, trajectories)]


@pytest.mark.parametrize(
    ("which", "chosen"),
    [
        ("last", [(0, 2), (2, 0), (4, 3)]),
        ("first", [(0, 0), (2, 0), (4, 1)]),
        ("all", [(0, 0), (0, 2), (2, 0), (4, 1), (4, 3)]),
    ],
)
def test_which_calls(which, chosen) -> None:
    groups = _parents("-+-", "+0.", "-0", "", "+-+-")
    found = failed_calls(groups, BranchPolicy(which), seed=0)
    seeds = [t.seed for t in groups[0].trajectories]
    assert [(seeds.index(c.trajectory.seed), c.call_index) for c in found] == chosen


def test_drawn_calls_depend_on_the_seed_alone() -> None:
    groups = _parents(*["---"] * 40)

    def drawn(policy, seed, groups=groups):
        return [(c.trajectory.seed, c.call_index) for c in failed_calls(groups, policy, seed)]

    sampled = BranchPolicy("sampled")
    assert drawn(sampled, 1) == drawn(sampled, 1) != drawn(sampled, 2)
    assert [seed for seed, _ in drawn(sampled, 1)] == list(range(40))
    counts = [[i for s in range(20) for _, i in drawn(sampled, s)].count(k) for k in range(3)]
    assert min(counts) > 200  # of 800, a third each
    few = BranchPolicy("all", max_groups=7)
    assert drawn(few, 1) == drawn(few, 1) != drawn(few, 2)
    assert len(drawn(few, 1)) == 7
    assert drawn(few, 1) == sorted(drawn(few, 1))
    # Nor on the order of the trajectories.
    turned = [RolloutGroup(PROMPT, groups[0].trajectories[::-1])]
    assert sorted(drawn(few, 1, turned)) == drawn(few, 1)
    assert drawn(BranchPolicy("all", max_groups=0), 1) == []


async def test_seeds_of_continuations(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([BAD, f"so\n{BAD}"], sandbox)
    asked = []

    class Recording(ScriptedEngine):
        def generate(self, request):
            asked.append(request.sampling.seed)
            return super().generate(request)

    contexts = (PROMPT, (*PROMPT, *setup.ids("so")))
    engine = Recording({context: [setup.script("x")] for context in contexts})
    policy = BranchPolicy(l_suf=1, group_size=3)

    async def seeds(base: int) -> list[list[int]]:
        asked.clear()
        steps = await setup.branch(
            engine, sandbox, groups, policy, sampling=replace(setup.sampling, seed=base)
        )
        drawn = [[t.seed for t in s.continuations] for s in steps]
        assert {s for group in drawn for s in group} == set(asked)
        return drawn

    first = await seeds(5)
    assert first == await seeds(5)
    parents = {t.seed for g in groups for t in g.trajectories}
    drawn = {s for group in first for s in group}
    assert len(drawn) == 6
    assert not drawn & parents
    assert not drawn & {s for group in await seeds(6) for s in group}
    # A call's seeds depend on no other call.
    groups[0].trajectories.reverse()
    assert await seeds(5) == first[::-1]


async def test_the_parents_budgets_go_on(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([f"{GOOD}{BAD}end"], sandbox)
    parent = groups[0].trajectories[0]
    prefix = tuple(parent.token_ids[: parent.tool_calls[1].start])
    engine = ScriptedEngine({prefix: [setup.script("x" * 50), setup.script(GOOD)]})
    limits = RolloutLimits(max_response_tokens=len(prefix) - len(PROMPT) + 20, max_tool_calls=1)
    policy = BranchPolicy(l_suf=0, group_size=2)
    (step,) = await setup.branch(engine, sandbox, groups, policy, limits=limits)
    long, second = step.continuations
    assert (long.stop_reason, len(long.response_ids)) == (StopReason.MAX_TOKENS, 20)
    assert second.stop_reason is StopReason.MAX_TOOL_CALLS
    assert step.rewards == [0.0, None]  # never ran is not failed


async def test_infrastructure_is_not_scored(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([BAD], sandbox)
    scripts = [setup.script("```py\nbroken\n```"), Script((5,), fail_at=0), setup.script(GOOD)]
    engine = ScriptedEngine({PROMPT: scripts})
    (step,) = await setup.branch(engine, sandbox, groups, BranchPolicy(l_suf=0, group_size=3))
    assert step.rewards == [None, None, 1.0]
    assert [t.stop_reason for t in step.continuations] == [
        StopReason.TOOL_FAILURE, StopReason.ENGINE_FAILURE, StopReason.CALL_DONE,
    ]  # fmt: skip
    assert engine.kv_budget.live_sequences == 0


@pytest.mark.parametrize(("max_sequences", "peak"), [(3, 3), (1, 1)])
async def test_admission_follows_the_kv_budget(setup, max_sequences, peak) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([BAD, f"{BAD}{BAD}"], sandbox)
    seen = []

    class Watched(ScriptedEngine):  # raises beyond its budget
        async def generate(self, request):
            async for chunk in super().generate(request):
                seen.append(self.kv_budget.live_sequences)
                yield chunk

    prefixes = [t.token_ids[: t.tool_calls[-1].start] for t in groups[0].trajectories]
    engine = Watched(
        {tuple(p): [setup.script(GOOD)] for p in prefixes}, max_sequences=max_sequences
    )
    steps = await setup.branch(engine, sandbox, groups, BranchPolicy(l_suf=0, group_size=4))
    assert [s.rewards for s in steps] == [[1.0] * 4] * 2
    assert max(seen) == peak


async def test_equal_blocks_of_a_group_run_once(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([BAD], sandbox)
    n_before = len(sandbox.requests)
    policy = BranchPolicy(l_suf=0, group_size=4)
    for memo, runs in [(True, 1), (False, 4)]:
        engine = ScriptedEngine({PROMPT: [setup.script(GOOD)]})
        (step,) = await setup.branch(engine, sandbox, groups, policy, memo=memo)
        assert step.rewards == [1.0] * 4
        assert len(sandbox.requests) - n_before == runs
        n_before = len(sandbox.requests)


class _NoFork(ScriptedEngine):
    """As an engine behind HTTP: forks and truncates in name only."""

    @property
    def capabilities(self):
        return replace(super().capabilities, native_fork=False, native_truncate=False)

    async def fork(self, session, n, at_token):
        raise AssertionError("forked")


async def test_siblings_are_forked_where_the_engine_can(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([f"think\n{BAD}"], sandbox)
    prefix = (*PROMPT, *setup.ids("think\n"))
    prefills = {}
    for kind in (ScriptedEngine, _NoFork):
        engine = kind({prefix: [setup.script(GOOD)]}, token_s=0.001)
        (step,) = await setup.branch(engine, sandbox, groups, BranchPolicy(l_suf=0, group_size=4))
        assert step.rewards == [1.0] * 4
        prefills[kind] = sorted(t.metrics["prefill_tokens"] for t in step.continuations)
    assert prefills[_NoFork] == [len(prefix)] * 4
    assert prefills[ScriptedEngine] == [0, 0, 0, len(prefix)]


async def test_a_first_sibling_that_ends_at_once_holds_nobody_up(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([BAD], sandbox)
    engine = ScriptedEngine({PROMPT: [setup.script(""), Script((5,), fail_at=0)]}, token_s=0.001)
    (step,) = await setup.branch(engine, sandbox, groups, BranchPolicy(l_suf=0, group_size=4))
    eos, failure = StopReason.EOS, StopReason.ENGINE_FAILURE
    assert [t.stop_reason for t in step.continuations] == [eos, failure, eos, failure]
    assert engine.kv_budget.live_sequences == 0


async def test_cancelling_leaves_no_session_behind(setup, until) -> None:
    groups = await setup.roll_out([BAD], setup.sandbox())
    forks = []

    class SlowToFork(ScriptedEngine):
        async def fork(self, session, n, at_token):
            names = await super().fork(session, n, at_token)
            forks.extend(names)
            await asyncio.sleep(0.05)  # it is done, and its asker does not know yet
            return names

    for when in ("forking", "running"):
        slow = setup.sandbox(delay_s=60)
        engine = SlowToFork({PROMPT: [setup.script(GOOD)]}, token_s=0.001)
        forks.clear()
        task = asyncio.create_task(
            setup.branch(engine, slow, groups, BranchPolicy(l_suf=0, group_size=4))
        )
        await until(lambda: forks if when == "forking" else slow.running)  # noqa: B023
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.kv_budget.live_sequences == 0
        assert slow.running == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_nothing_failed(setup) -> None:
    sandbox = setup.sandbox()
    groups = await setup.roll_out([GOOD, "no call"], sandbox)
    assert await setup.branch(ScriptedEngine({}), sandbox, groups, BranchPolicy()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"which": "some"}, "which is 'some', expected 'last', 'first', 'all' or 'sampled'"),
        ({"l_suf": -1}, "l_suf is -1, expected >= 0"),
        ({"group_size": 0}, "group_size is 0, expected >= 1"),
        ({"max_groups": -1}, "max_groups is -1, expected >= 0 or None"),
    ],
)
def test_wrong_policies_are_named(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        BranchPolicy(**values)
