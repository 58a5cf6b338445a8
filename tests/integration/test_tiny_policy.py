"""The committed policy still does what its record says, along the real path.

How much luck is allowed: a run over ``n`` episodes of a policy whose true accuracy is the recorded
``p`` falls more than ``4 * sqrt(p * (1 - p) / n)`` below it once in 30 000 times; the recorded
figure is itself a sample, which adds its own variance. One episode on top keeps greedy accuracies
near 1 from being a bound of no tolerance at all.
"""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from thor_fast.config import load_toml
from thor_fast.engines.paged import PagedEngine
from thor_fast.sandbox import NativeSandbox
from thor_fast.synthetic import TEST_SEED, TRAINED_FAMILIES, load_tiny_policy, task_set
from thor_fast.synthetic import tiny_policy_path as policy_path
from thor_fast.synthetic.evaluate import ACCURACY_FILE, ARMS, measure, table
from thor_fast.synthetic.recipe import Recipe
from thor_fast.synthetic.train import build_model

N_TASKS = 140  # 20 per trained family
RECORD = json.loads((policy_path() / ACCURACY_FILE).read_text("utf-8"))
RECORDED = {m["arm"]: m for m in RECORD["measurements"]}
BY_NAME = {arm.name: arm for arm in ARMS}


def _accuracy(recorded):
    n = sum(recorded["episodes"].values())
    return sum(recorded["correct"].values()) / n, n


def _lowest(p, n_recorded, n):
    return p - 4 * math.sqrt(p * (1 - p) * (1 / n + 1 / n_recorded)) - 1 / n


@pytest.fixture(scope="module")
def policy():
    return load_tiny_policy()


def _measure(policy, name):
    model, tokenizer = policy
    tasks = task_set(N_TASKS, TEST_SEED, BY_NAME[name].families)
    engine = PagedEngine(model, max_sequences=64, max_context=512)
    try:
        with NativeSandbox() as sandbox:
            return measure(BY_NAME[name], tasks, engine, sandbox, tokenizer)
    finally:
        asyncio.run(engine.aclose())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tool, greedy", "tool, T=1"])
def test_committed_weights_reach_their_recorded_accuracy(policy, name):
    got = _measure(policy, name)
    p, n_recorded = _accuracy(RECORDED[name])
    assert got.accuracy >= _lowest(p, n_recorded, N_TASKS), table([got])
    if name == "tool, T=1":
        recorded = RECORDED[name]
        p = recorded["first_failed"] / recorded["first_calls"]
        failed = got.first_failed / got.first_calls
        margin = 4 * math.sqrt(p * (1 - p) * (1 / N_TASKS + 1 / recorded["first_calls"]))
        assert abs(failed - p) <= margin, table([got])


@pytest.mark.slow
def test_without_the_tool_it_is_lost(policy):
    got = _measure(policy, "direct, greedy")
    assert got.accuracy <= 0.1, table([got])
    assert got.calls == 0


def test_record_meets_the_goals():
    greedy, n = _accuracy(RECORDED["tool, greedy"])
    sampled, _ = _accuracy(RECORDED["tool, T=1"])
    direct, _ = _accuracy(RECORDED["direct, greedy"])
    assert RECORD["task_seed"] == TEST_SEED
    assert n >= 50 * len(TRAINED_FAMILIES)
    assert greedy >= 0.85
    assert sampled >= 0.75
    assert direct <= 0.1
    first = RECORDED["tool, T=1"]
    assert 0.15 <= first["first_failed"] / first["first_calls"] <= 0.25


def test_weights_are_small_and_fit_the_recipe(policy):
    model, tokenizer = policy
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(f.stat().st_size for f in policy_path().iterdir()) < 5_000_000
    recipe = load_toml(policy_path() / "recipe.toml", Recipe)
    fresh = build_model(recipe.architecture, tokenizer)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_engine_loads_the_folder_in_float32(policy):
    engine = PagedEngine.from_pretrained(policy_path(), max_sequences=1, max_context=512)
    asyncio.run(engine.aclose())
    assert str(policy[0].dtype) == "torch.float32"
