"""A training run that takes seconds: a random model, a reward of its tokens, no code to run.

Also a script, for runs in processes of their own: ``python training_run.py RUNS``, which are the
arguments of ``run`` for each run, in JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from thor_fast.config import from_mapping
from thor_fast.engines.paged import PagedEngine
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rl.trainer import Trainer
from thor_fast.rollout import Prompt
from thor_fast.tools.base import DetectedCall
from thor_fast.types import ExecutionRequest, ExecutionResult, Trajectory

VOCAB, EOS = 24, 1
TINY = {
    "device": "cpu",
    "steps": 4,
    "train_prompts": 2,
    "group_size": 4,
    "max_batches": 2,
    "micro_batch_tokens": 64,
    "checkpoint_every": 2,
    # One at a time: what shares a forward with what would depend on the clock otherwise.
    "max_live": 1,
    "limits": {"max_response_tokens": 8, "max_tool_calls": 0},
    "optimizer": {"lr": 1e-2},
}


class NoTool:
    """A tool that nothing calls."""

    def detector(self, draft=None):
        return self

    def feed(self, token_id: int) -> DetectedCall | None:
        return None

    def skip(self, n_tokens: int) -> None:
        raise AssertionError("nothing is spliced in")

    def request(self, call: DetectedCall) -> ExecutionRequest:
        raise AssertionError("nothing is run")

    def observation(self, call: DetectedCall, result: ExecutionResult) -> str:
        raise AssertionError("nothing is run")


def tiny_model(seed: int = 0, *, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def even_tokens(trajectory: Trajectory, reference: str) -> float:
    """The share of even tokens: something that a policy of any size can learn."""
    response = trajectory.response_ids
    return sum(token % 2 == 0 for token in response) / len(response)


def make_trainer(
    model=None,
    *,
    engine_model=None,
    sandbox=None,
    prompts: int = 6,
    reward=even_tokens,
    output_dir=None,
    resume=False,
    **over,
) -> Trainer:
    """``over``: what differs from ``TINY``."""
    model = tiny_model() if model is None else model
    sampled = model if engine_model is None else engine_model
    return Trainer(
        model,
        PagedEngine(sampled, max_sequences=8, max_context=32),
        sandbox,
        NoTool(),
        [Prompt((2 + i, 3, 4), str(i), f"task{i}") for i in range(prompts)],
        encode=lambda _: [],
        reward=reward,
        eos_token_ids=frozenset({EOS}),
        config=from_mapping({**TINY, **over}, TrainerConfig),
        engine_model=engine_model,
        output_dir=output_dir,
        resume=resume,
    )


class _Deadly:
    """A reward that kills the process in the middle of a rollout."""

    def __init__(self, calls: int) -> None:
        self._calls = calls

    def __call__(self, trajectory: Trajectory, reference: str) -> float:
        self._calls -= 1
        if self._calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return even_tokens(trajectory, reference)


def _tell_accelerate_to_shard() -> None:
    """It takes FSDP2 for accelerators only; torch has it on CPUs, too."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = Accelerator().state
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )


def run(
    output_dir: str,
    *,
    resume: bool = False,
    die_after: int | None = None,
    shard: bool = False,
    tied: bool = True,
    **over,
) -> None:
    """Train; rank 0 leaves the weights in ``OUTPUT_DIR/weights.pt``. ``die_after``: rewards.

    ``shard``: the model over all ranks, and the engine has one of its own.
    """
    torch.set_num_threads(1)
    if shard:
        _tell_accelerate_to_shard()
    trained = tiny_model(tied=tied)
    # Other weights: those of the trained model must come here, at the start and after each step.
    sampled = tiny_model(seed=5, tied=tied) if shard else trained
    trainer = make_trainer(
        trained,
        engine_model=sampled if shard else None,
        reward=even_tokens if die_after is None else _Deadly(die_after),
        output_dir=Path(output_dir),
        resume=resume,
        **over,
    )
    trainer.train()
    asyncio.run(trainer.engine.aclose())
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(sampled.state_dict(), Path(output_dir) / "weights.pt")


def main() -> None:
    """Runs one behind the other: a list of ``run``'s arguments."""
    for options in json.loads(sys.argv[1]):
        run(**options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
