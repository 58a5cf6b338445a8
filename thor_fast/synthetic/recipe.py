"""Every number that decides the weights of the tiny policy, as sections of one TOML file."""

from __future__ import annotations

from dataclasses import dataclass

from thor_fast.synthetic.transcripts import Shares

__all__ = ["Architecture", "Optimisation", "Recipe"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Qwen3 model with tied embeddings. ``qk_gain``: initial gain of the query and key norms.

    Normed queries and keys bound an attention logit by ``gain**2 * sqrt(head_dim)``; copying digits
    needs nearly one-hot attention, which a gain of 1 cannot express and learns slowly.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    max_positions: int
    qk_gain: float


@dataclass(frozen=True, slots=True)
class Optimisation:
    """``batch_tokens``: tokens of one step, padding included. Learning rates are peak values.

    Matrices of the blocks are trained by Muon (``matrix_lr``), everything else by AdamW
    (``other_lr``): linear warm-up over ``warmup_steps``, then down to 0 linearly from the step
    ``decay_from * steps`` on.
    """

    steps: int
    batch_tokens: int
    matrix_lr: float
    other_lr: float
    weight_decay: float
    warmup_steps: int
    decay_from: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything :mod:`thor_fast.synthetic.train` needs. ``seed`` also orders the data."""

    seed: int
    architecture: Architecture
    optimisation: Optimisation
    shares: Shares
