"""Trajectories with observations, groups of both levels and tiny models, for tests of training."""

from __future__ import annotations

import random

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from thor_fast.rl import TrainingSequence
from thor_fast.types import Segment, TokenSource, Trajectory

VOCAB = 61
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def make_model(
    kind: str = "qwen3",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Random weights, large enough for attention to look somewhere."""
    torch.manual_seed(seed)
    config = CONFIGS[kind](
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_trajectory(
    rng: random.Random, prompt: tuple[int, ...], runs: tuple[int, ...], reward: float | None = None
) -> Trajectory:
    """``runs``: lengths of segments, in turns of the model and of the tool."""
    made = Trajectory(prompt, reward=reward)
    for number, length in enumerate(runs):
        ids = tuple(rng.randrange(VOCAB) for _ in range(length))
        if number % 2:
            made.append(Segment(TokenSource.TOOL, ids))
        else:
            logprobs = tuple(-3 + rng.uniform(-0.3, 0.3) for _ in ids)
            made.append(Segment(TokenSource.MODEL, ids, logprobs))
    return made


def make_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(length))


def make_sequences(seed: int = 0) -> list[TrainingSequence]:
    """Two groups of episodes and two of steps, 3 each; lengths and advantages all different."""
    rng = random.Random(seed)
    sequences = []
    for group in range(4):
        level = group // 2
        prompt = make_prompt(rng, 3 + 8 * level + group)
        for number in range(3):
            runs = (1 + rng.randrange(5),) if level else (2 + number, 2, 1 + rng.randrange(4))
            trajectory = make_trajectory(rng, prompt, runs)
            sequences.append(TrainingSequence(trajectory, level, rng.uniform(-1, 1), group))
    return sequences
