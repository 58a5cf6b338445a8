"""Rollouts of the tiny policy, branched and packed: what was sampled is what is trained on."""

from __future__ import annotations

import asyncio
import itertools
import zlib

import pytest
import torch

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.paged import PagedEngine
from thor_fast.rl import (
    AdvantagePolicy,
    HierarchicalGRPOLoss,
    hidden_states,
    hierarchical_advantages,
    pack,
)
from thor_fast.rollout import (
    ObservationEncoder,
    Prompt,
    Renderer,
    RolloutLimits,
    RolloutScheduler,
)
from thor_fast.rollout.branch import BranchPolicy, branch_failed_steps
from thor_fast.synthetic import TEST_SEED, load_tiny_policy, task_set
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, RolloutGroup, Status, StepGroup

TEMPERATURE = 0.9


def answer(code: str) -> ExecutionResult:
    """One snippet in two fails, and one in sixteen is not the model's fault."""
    drawn = zlib.crc32(code.encode())
    if drawn % 16 == 0:
        return ExecutionResult(Status.INFRA, error="clone: EAGAIN")
    return ExecutionResult(Status.OK if drawn % 2 else Status.ERROR, "12\n", "NameError: x")


@pytest.fixture(scope="module")
def policy():
    return load_tiny_policy()


async def roll_out(policy, sandbox) -> tuple[list[RolloutGroup], list[StepGroup]]:
    model, tokenizer = policy
    render = Renderer(tokenizer)
    tool = PythonTool(tokenizer)
    settings = {
        "encode": ObservationEncoder(tokenizer),
        "limits": RolloutLimits(max_response_tokens=200, max_tool_calls=3),
        "sampling": SamplingParams(temperature=TEMPERATURE, seed=3),
        "eos_token_ids": frozenset({tokenizer.eos_token_id}),
    }
    engine = PagedEngine(model, max_sequences=24, max_context=256)
    try:
        scheduler = RolloutScheduler(engine, sandbox, tool, group_size=4, **settings)
        tasks = task_set(6, seed=TEST_SEED)
        groups = await scheduler.run([Prompt(render.prompt(task.prompt)) for task in tasks])
        steps = await branch_failed_steps(
            engine, sandbox, tool, groups, BranchPolicy(l_suf=6, group_size=4), **settings
        )
    finally:
        await engine.aclose()
    for group in groups:
        for number, trajectory in enumerate(group.trajectories):
            if not trajectory.stop_reason.is_infrastructure:
                trajectory.reward = float(number % 2)
    return groups, steps


@pytest.fixture(scope="module")
def rollouts(policy, fake_sandbox):
    return asyncio.run(roll_out(policy, fake_sandbox(answer)))


def test_log_probs_of_the_batch_are_those_the_engine_sampled_with(policy, rollouts):
    model, (groups, steps) = policy[0], rollouts
    sequences = hierarchical_advantages(groups, steps, AdvantagePolicy())
    assert {s.level for s in sequences} == {0, 1}
    scored = sum(r is not None for group in (*groups, *steps) for r in group.rewards)
    everything = sum(len(g.trajectories) for g in groups) + sum(len(g.continuations) for g in steps)
    assert 0 < len(sequences) == scored < everything
    loss = HierarchicalGRPOLoss(drop_zero_adv=False)
    for share in (False, True):
        batches = pack(sequences, max_tokens=1024, share_prefixes=share, temperature=TEMPERATURE)
        assert len(batches) > 1
        for batch in batches:
            assert (batch.prefix is not None) == share
            with torch.no_grad():
                found = loss(hidden_states(model, batch), model.lm_head, batch)
            rows = batch.loss_mask.roll(-1)
            torch.testing.assert_close(
                found.logp[rows], batch.old_logprobs[batch.loss_mask], rtol=1e-4, atol=1e-4
            )
            # A continuation's first token is among them: its row is the repeated one.
            firsts = [
                start
                for number, start in enumerate(batch.cu_seqlens[:-1].tolist())
                if share and batch.prefix[number, 1]
            ]
            assert rows[firsts].all()


def test_sharing_saves_tokens_of_real_rollouts(rollouts):
    groups, steps = rollouts
    for chosen in ((groups, []), ([], steps)):
        sequences = hierarchical_advantages(*chosen, AdvantagePolicy())
        alone, shared = (
            sum(len(b.token_ids) for b in pack(sequences, max_tokens=4096, share_prefixes=share))
            for share in (False, True)
        )
        families = [list(f) for _, f in itertools.groupby(sequences, lambda s: s.group)]
        saved = sum((len(f) - 1) * (len(f[0].trajectory.prompt_ids) - 1) for f in families)
        assert saved > 0
        # Prefixes may be equal across groups, too.
        assert alone - shared >= saved
