"""The tiny policy, the embedded engine and the native sandbox: retries, step groups, replay.

Sampling is seeded, so each run gives the same episodes on one machine. Bounds leave room for the
rounding of another one: a first call fails in a fifth of the episodes, a retry recovers 9 of 10.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import GenerateRequest, SamplingParams
from thor_fast.engines.paged import PagedEngine
from thor_fast.inference import count_corrections, highest_pass_rate, majority_vote, self_correct
from thor_fast.rewards import MathAnswerReward
from thor_fast.rewards.math_answer import last_boxed
from thor_fast.rollout import (
    BacktrackPolicy,
    BranchPolicy,
    ObservationEncoder,
    Prompt,
    Renderer,
    RolloutLimits,
    RolloutScheduler,
    branch_failed_steps,
)
from thor_fast.rollout.records import TrajectoryWriter, read_trajectories
from thor_fast.rollout.replay import Replayer, first_difference
from thor_fast.sandbox import NativeSandbox
from thor_fast.synthetic import TEST_SEED, load_tiny_policy, task_set
from thor_fast.tools import PythonTool
from thor_fast.types import StopReason

FAMILIES = ("arithmetic", "powers", "digits", "counting")
# Far above what another order of summation changes (2.3e-5), far below what another token does.
SUMMED_OTHERWISE = 1e-3


class World:
    """A policy and all that an episode of it needs; an engine of its own for each use."""

    def __init__(self) -> None:
        self.model, tokenizer = load_tiny_policy()
        self.render = Renderer(tokenizer)
        self.tool = PythonTool(tokenizer)
        self.parts = {
            "encode": ObservationEncoder(tokenizer),
            "limits": RolloutLimits(max_response_tokens=384),
            "sampling": SamplingParams(seed=1),
            "eos_token_ids": frozenset({tokenizer.eos_token_id}),
        }
        self.tasks = task_set(48, TEST_SEED, FAMILIES)
        self.prompts = [
            Prompt(self.render.prompt(t.prompt), t.answer, t.task_id) for t in self.tasks
        ]
        self.reward = MathAnswerReward(self.render)

    def engine(self) -> PagedEngine:
        return PagedEngine(self.model, max_sequences=32, max_context=512)

    async def sample(self, engine, n, *, backtrack=None, max_live=None, group_size=1):
        with NativeSandbox() as sandbox:
            scheduler = RolloutScheduler(
                engine, sandbox, self.tool, **self.parts, reward=self.reward,
                backtrack=backtrack, max_live=max_live, group_size=group_size,
            )  # fmt: skip
            return await scheduler.run(self.prompts[:n])

    def replayer(self, engine, **options) -> Replayer:
        return Replayer(engine=engine, tool=self.tool, **self.parts, **options)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def plain(world):
    """48 episodes as they come."""

    async def run():
        engine = world.engine()
        groups = await world.sample(engine, 48)
        await engine.aclose()
        return groups

    return asyncio.run(run())


def accuracy(groups) -> float:
    rewards = [r for g in groups for r in g.rewards]
    assert None not in rewards
    return sum(rewards) / len(rewards)


async def test_self_correction_raises_success(world, plain) -> None:
    engine = world.engine()
    with NativeSandbox() as sandbox:
        corrected, counts = await self_correct(
            engine, sandbox, world.tool, world.prompts, BacktrackPolicy(), **world.parts,
            reward=world.reward,
        )  # fmt: skip
    assert engine.kv_budget.live_sequences == 0
    await engine.aclose()
    before = count_corrections(plain)
    assert before.first_failed >= 4
    assert (before.attempts, before.recovered) == (0, 0)
    assert counts.first_failed >= 4
    assert counts.recovered >= counts.first_failed / 2
    assert counts.final_pass_rate > before.final_pass_rate
    assert accuracy(corrected) > accuracy(plain)
    for one, other in zip(plain, corrected, strict=True):
        before, after = one.trajectories[0], other.trajectories[0]
        # The same noise up to the first failure, which is then an attempt.
        if after.attempts:
            first = after.attempts[0]
            kept = after.token_ids[: first.cut]
            gone = [i for s in first.segments for i in s.token_ids]
            assert before.token_ids[: first.cut + len(gone)] == kept + gone
        else:
            assert before.token_ids == after.token_ids


async def test_step_groups_share_the_prefix_and_hold_what_recovers(world, plain) -> None:
    engine = world.engine()
    policy = BranchPolicy("all", l_suf=100, group_size=4)
    with NativeSandbox() as sandbox:
        steps = await branch_failed_steps(engine, sandbox, world.tool, plain, policy, **world.parts)
        again = await branch_failed_steps(
            engine, sandbox, world.tool, plain, replace(policy, max_groups=2), **world.parts
        )
    assert engine.kv_budget.live_sequences == 0
    await engine.aclose()
    failed = [
        (t, i)
        for g in plain
        for t in g.trajectories
        for i, c in enumerate(t.tool_calls)
        if c.passed is False
    ]
    assert [(s.parent, s.call_index) for s in steps] == failed
    rewards = [r for s in steps for r in s.rewards]
    assert 0.5 < sum(rewards) / len(rewards) < 1
    for step in steps:
        prefills = sorted(t.metrics["prefill_tokens"] for t in step.continuations)
        assert prefills[:3] == [1, 1, 1]  # forked at the prefix
        for t in step.continuations:
            assert t.prompt_ids == step.prefix_ids
            assert t.stop_reason in (StopReason.CALL_DONE, StopReason.EOS)
            assert (t.sampling_logprobs[len(t.prompt_ids) :] < 0).all()
    places = {(id(s.parent), s.call_index): s for s in steps}
    for step in again:  # seeds depend on the call alone, not on what else runs
        same = places[id(step.parent), step.call_index]
        assert [t.token_ids for t in step.continuations] == [
            t.token_ids for t in same.continuations
        ]


async def test_a_run_replays_bit_for_bit_without_its_sandbox(world, tmp_path) -> None:
    """One at a time: tokens and log-probs. Step groups and runs of many at once: tokens."""
    policy = BacktrackPolicy(keep="best", attempts_per_call=1, hint=True)
    engine = world.engine()
    path = tmp_path / "run.jsonl"
    with TrajectoryWriter(path) as writer, NativeSandbox() as sandbox:
        groups = await world.sample(engine, 16, backtrack=policy, max_live=1)
        writer.write(groups, policy="one at a time")
        many = await world.sample(engine, 8, group_size=2)
        steps = await branch_failed_steps(
            engine, sandbox, world.tool, many, BranchPolicy(group_size=2), **world.parts
        )
        writer.write(many, steps, policy="many")
    await engine.aclose()
    first, second = read_trajectories(path)
    assert (first.groups, second.groups, second.step_groups) == (groups, many, steps)
    assert sum(len(t.attempts) for g in groups for t in g.trajectories) >= 2

    engine = world.engine()
    replayer = world.replayer(engine, backtrack=policy)
    for recorded in (t for g in first.groups for t in g.trajectories):
        assert first_difference(recorded, await replayer.replay(recorded)) is None
    replayer = replace(replayer, backtrack=None)
    for recorded in (t for g in second.groups for t in g.trajectories):
        again = await replayer.replay(recorded)
        difference = first_difference(recorded, again, logprob_tolerance=SUMMED_OTHERWISE)
        assert difference is None
    for step in second.step_groups:
        again = await replayer.replay_step(step)
        assert again.rewards == step.rewards
        for recorded, replayed in zip(step.continuations, again.continuations, strict=True):
            difference = first_difference(recorded, replayed, logprob_tolerance=SUMMED_OTHERWISE)
            assert difference is None
    assert engine.kv_budget.live_sequences == 0
    await engine.aclose()


async def test_a_trajectory_again_from_each_of_its_steps(world, plain) -> None:
    recorded = max((t for g in plain for t in g.trajectories), key=lambda t: len(t.tool_calls))
    assert len(recorded.tool_calls) >= 2
    engine = world.engine()
    replayer = world.replayer(engine)
    with NativeSandbox() as sandbox:
        for call in recorded.tool_calls:
            for at_token in (call.start - 3, call.start + 5, call.end):
                for source in (None, sandbox):
                    again = await replayer.rerun(recorded, at_token, sandbox=source)
                    assert again.token_ids == recorded.token_ids
        other = await replayer.rerun(
            recorded, recorded.tool_calls[0].start, sandbox=sandbox, seed=3
        )
    await engine.aclose()
    assert (
        other.token_ids[: recorded.tool_calls[0].start]
        == (recorded.token_ids[: recorded.tool_calls[0].start])
    )
    assert other.token_ids != recorded.token_ids


async def continued(engine, ids, session, n=24, **sampling) -> list[int]:
    request = GenerateRequest(tuple(ids), session, n, sampling=SamplingParams(**sampling))
    return [t async for chunk in engine.generate(request) for t in chunk.token_ids]


@pytest.fixture(scope="module")
def warm(world):
    engine = world.engine()
    yield engine
    asyncio.run(engine.aclose())


@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_kv_behind_a_rollback_is_that_of_a_cold_run(world, plain, warm, data) -> None:
    """Greedy tokens after truncate, after fork and from nothing are the same; and the same seed
    from the same position draws the same tokens again."""
    t = data.draw(st.sampled_from([t for g in plain for t in g.trajectories if t.tool_calls]))
    cut = data.draw(st.integers(1, len(t) - 1))
    seed = data.draw(st.integers(0, 2**63))
    kept = t.token_ids[:cut]

    async def run() -> None:
        cold = world.engine()
        await continued(warm, t.token_ids, "a", temperature=0)
        await warm.truncate("a", cut)
        drawn = await continued(warm, kept, "a", seed=seed)
        await warm.truncate("a", cut)
        assert await continued(warm, kept, "a", seed=seed) == drawn
        (fork,) = await warm.fork("a", 1, cut)
        await warm.truncate("a", cut)
        greedy = await continued(cold, kept, "b", temperature=0)
        assert await continued(warm, kept, "a", temperature=0) == greedy
        assert await continued(warm, kept, fork, temperature=0) == greedy
        for session in ("a", fork):
            await warm.release(session)
        assert warm.kv_budget.live_sequences == 0
        await cold.aclose()

    asyncio.run(run())


async def test_the_best_of_several(world) -> None:
    engine = world.engine()
    groups = await world.sample(engine, 24, group_size=4)
    await engine.aclose()

    def answer(trajectory):
        return last_boxed(world.render.answer(trajectory))

    voted = clean = 0
    for group in groups:
        vote = majority_vote(group, answer)
        best = highest_pass_rate(group)
        clean_vote = majority_vote(group, answer, among=best.tied)
        voted += vote.sample is not None and group.rewards[vote.sample]
        clean += clean_vote.sample is not None and group.rewards[clean_vote.sample]
        assert vote.voters <= 4
        assert clean_vote.voters <= vote.voters
        if best.sample is not None:
            calls = group.trajectories[best.sample].tool_calls
            assert sum(c.passed for c in calls) == best.pass_rate * len(calls)
    assert min(voted, clean) / len(groups) >= accuracy(groups)
