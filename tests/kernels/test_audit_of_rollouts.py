"""The op's purpose: what an engine reported when sampling is what the final hidden states say."""

from __future__ import annotations

import asyncio

import pytest
import torch

import thor_fast as tf
from thor_fast.kernels import IGNORED_TARGET, selected_logprob
from thor_fast.synthetic import load_tiny_policy, task_set

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def policy():
    return load_tiny_policy()


@pytest.fixture(scope="module")
def trajectories(policy):
    model, tokenizer = policy
    render = tf.Renderer(tokenizer)

    async def rollouts(sandbox):
        engine = tf.PagedEngine(model, max_sequences=4, max_context=512)
        scheduler = tf.RolloutScheduler(
            engine,
            sandbox,
            tf.PythonTool(tokenizer),
            encode=tf.ObservationEncoder(tokenizer),
            limits=tf.RolloutLimits(max_response_tokens=300),
            sampling=tf.SamplingParams(temperature=TEMPERATURE, seed=3),
            eos_token_ids=frozenset({tokenizer.eos_token_id}),
        )
        try:
            return await scheduler.run(
                [tf.Prompt(render.prompt(task.prompt)) for task in task_set(6, seed=2)]
            )
        finally:
            await engine.aclose()

    with tf.NativeSandbox(slots=2) as sandbox:
        groups = asyncio.run(rollouts(sandbox))
    return [trajectory for group in groups for trajectory in group.trajectories]


@torch.no_grad()
def test_sampling_logprobs_are_those_of_the_final_hidden_states(policy, trajectories):
    model, _ = policy
    assert any(trajectory.tool_calls for trajectory in trajectories)
    for trajectory in trajectories:
        ids = torch.tensor(trajectory.token_ids)
        mask = torch.from_numpy(trajectory.loss_mask).bool()
        hidden = model.model(ids[None]).last_hidden_state[0]
        # Row t predicts token t + 1; prompt and observations are nobody's samples.
        targets = torch.where(mask, ids, IGNORED_TARGET)[1:]
        got = selected_logprob(
            hidden[:-1], model.lm_head.weight, targets, temperature=TEMPERATURE, chunk_rows=50
        )
        reported = torch.from_numpy(trajectory.sampling_logprobs)[1:]
        # Both are float32 sums in another order (decode step by step, prefill at once).
        torch.testing.assert_close(got.double(), reported, rtol=0, atol=5e-5)
        assert not got[~mask[1:]].any()
        assert bool(got[mask[1:]].any())


@torch.no_grad()
def test_a_shifted_mask_does_not_pass_the_audit(policy, trajectories):
    model, _ = policy
    trajectory = max(trajectories, key=lambda t: len(t.tool_calls))
    ids = torch.tensor(trajectory.token_ids)
    mask = torch.from_numpy(trajectory.loss_mask).bool().roll(1)
    hidden = model.model(ids[None]).last_hidden_state[0]
    targets = torch.where(mask, ids, IGNORED_TARGET)[1:]
    got = selected_logprob(hidden[:-1], model.lm_head.weight, targets, temperature=TEMPERATURE)
    reported = torch.from_numpy(trajectory.sampling_logprobs)[1:]
    assert float((got.double() - reported).abs().max()) > 0.01
