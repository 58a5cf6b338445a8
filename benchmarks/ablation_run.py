"""One policy of the ablation, in a process of its own: trained, then examined.

``python ablation_run.py ORDER.json`` reads what to do and writes ``RESULT.json`` beside it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ablation_score import Score, limits_of, prompts_of, sample

from thor_fast.config import from_mapping
from thor_fast.engines.paged import PagedEngine
from thor_fast.rewards import MathAnswerReward
from thor_fast.rl.settings import OptimizerSettings, TrainerConfig
from thor_fast.rl.trainer import Trainer
from thor_fast.rollout.backtrack import BacktrackPolicy
from thor_fast.rollout.branch import BranchPolicy
from thor_fast.rollout.records import read_trajectories
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox import NativeSandbox
from thor_fast.synthetic import (
    HELD_OUT_FAMILIES,
    TEST_SEED,
    TRAINED_FAMILIES,
    load_tiny_policy,
    task_set,
)
from thor_fast.tools.python_tool import PythonTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["Order", "Preset"]

# Blocks of the tiny policy have about seven tokens of thought before them.
L_SUF = 8
_MAX_SEQUENCES, _MAX_CONTEXT = 64, 512
# Tasks of neither the cold start (1) nor the tests (2).
_RL_SEED = 3


@dataclass(frozen=True, slots=True)
class Preset:
    """How much of everything. ``test_tasks``: per family."""

    steps: int
    train_prompts: int
    group_size: int
    step_group_size: int
    lr: float
    test_tasks: int
    test_samples: int


@dataclass(frozen=True, slots=True)
class Order:
    """``train``: by which levels' rewards the tiny policy is trained first: ``none``, ``episode``
    or ``both``.
    """

    tool: bool
    train: str
    seed: int
    preset: Preset


def carry_out(order: Order, folder: Path) -> dict[str, Any]:
    """Train, examine; curves and scores as JSON's types. ``folder``: for the trainer's files."""
    torch.set_num_threads(1)
    model, tokenizer = load_tiny_policy()
    engine = PagedEngine(model, max_sequences=_MAX_SEQUENCES, max_context=_MAX_CONTEXT)
    with NativeSandbox() as sandbox:
        curve: list[dict[str, Any]] = []
        if order.train != "none":
            history = _trained(order, model, tokenizer, engine, sandbox, folder)
            curve = _curve(history, folder / "trajectories")
        scores = asyncio.run(_examined(order, engine, sandbox, tokenizer))
    return {"curve": curve, "scores": scores}


def _trained(
    order: Order,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    engine: PagedEngine,
    sandbox: NativeSandbox,
    folder: Path,
) -> list[dict[str, float]]:
    p, render = order.preset, Renderer(tokenizer)
    branch = BranchPolicy(
        "last", l_suf=L_SUF, group_size=p.step_group_size, max_groups=p.train_prompts
    )
    config = TrainerConfig(
        device="cpu",
        steps=p.steps,
        seed=order.seed,
        train_prompts=p.train_prompts,
        group_size=p.group_size,
        max_batches=1,
        micro_batch_tokens=512,
        limits=limits_of(order.tool),
        optimizer=OptimizerSettings(lr=p.lr, weight_decay=0.0),
        branch=branch if order.train == "both" else None,
        checkpoint_every=p.steps,
    )
    tasks = task_set(p.steps * p.train_prompts, _RL_SEED)
    trainer = Trainer(
        model,
        engine,
        sandbox,
        PythonTool(tokenizer),
        prompts_of(tasks, render, order.tool),
        encode=ObservationEncoder(tokenizer),
        reward=MathAnswerReward(render),
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        config=config,
        output_dir=folder,
    )
    return trainer.train()


def _curve(history: Sequence[Mapping[str, float]], folder: Path) -> list[dict[str, Any]]:
    """By updates done so far: what the step's own episodes, on tasks never seen, say of the policy.

    ``rollout_tokens``: sampled for training before this point, on both levels, as recorded.
    """
    points, tokens = [], 0
    names = ("call_success", "first_call_success", "step_groups", "step_success", "step_s")
    for step, (metrics, path) in enumerate(zip(history, sorted(folder.iterdir()), strict=True)):
        point = {"step": step, "rollout_tokens": tokens, "accuracy": metrics["reward"]}
        points.append(point | {name: metrics.get(name) for name in names})
        for batch in read_trajectories(path):
            sampled = [t for group in batch.groups for t in group.trajectories]
            sampled += [t for group in batch.step_groups for t in group.continuations]
            tokens += sum(int(t.loss_mask.sum()) for t in sampled)
    return points


async def _examined(
    order: Order, engine: PagedEngine, sandbox: NativeSandbox, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Scores by how calls are treated and on which families."""
    scores = {}
    ways: dict[str, BacktrackPolicy | None] = {"plain": None}
    if order.tool:
        ways["corrected"] = BacktrackPolicy(l_suf=L_SUF)
    for way, backtrack in ways.items():
        for families in (TRAINED_FAMILIES, HELD_OUT_FAMILIES):
            tasks = task_set(order.preset.test_tasks * len(families), TEST_SEED, families)
            score = await sample(
                engine,
                sandbox,
                tokenizer,
                tasks,
                tool=order.tool,
                samples=order.preset.test_samples,
                seed=order.seed,
                backtrack=backtrack,
            )
            where = "trained" if families is TRAINED_FAMILIES else "held out"
            scores[f"{way}, {where}"] = _numbers(score)
    await engine.aclose()
    return scores


def _numbers(score: Score) -> dict[str, Any]:
    return asdict(score) | {"accuracy": score.accuracy, "call_success": score.call_success}


def main(argv: Sequence[str] | None = None) -> int:
    """The file of the order is the only argument."""
    (path,) = map(Path, sys.argv[1:] if argv is None else argv)
    order = from_mapping(json.loads(path.read_text("utf-8")), Order)
    result = carry_out(order, path.parent / "run")
    (path.parent / "RESULT.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
