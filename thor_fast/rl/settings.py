"""What a training run may be told, as sections of one TOML file (``thor_fast.config.load_toml``).

Defaults are THOR's where THOR has one (run_code_grpo.sh and verl's configuration below it):
learning rate 1e-6, clip 0.2 / 0.28 and 3, no KL, NLL weight 0.01, temperature 1, groups of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from thor_fast.errors import ConfigError
from thor_fast.kernels import KL, Aggregation, LossSpec
from thor_fast.rl.advantages import AdvantagePolicy
from thor_fast.rl.losses import HierarchicalGRPOLoss
from thor_fast.rollout.branch import BranchPolicy
from thor_fast.rollout.limits import RolloutLimits

__all__ = ["LoraSettings", "LossSettings", "OptimizerSettings", "TrainerConfig"]


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW. The learning rate is constant after a linear warm-up over ``warmup_steps`` updates."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected > 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to below 1")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 0")


@dataclass(frozen=True, slots=True)
class LossSettings:
    """See ``LossSpec`` and ``HierarchicalGRPOLoss`` for what each of them does.

    ``episode_weight`` and ``step_weight``: of the two levels' means in the sum. ``kl_beta``: weight
    of the k3 estimate of the divergence from the model as it was before training; 0: none is kept.
    """

    kind: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    nll_alpha: float = 0.01
    kl_beta: float = 0.0
    entropy_coef: float = 0.0
    agg: Aggregation = "token-mean"
    norm_tokens: int | None = None
    normalizer: Literal["global", "thor"] = "global"
    episode_weight: float = 1.0
    step_weight: float = 1.0

    def __post_init__(self) -> None:
        self.module()

    def module(self) -> HierarchicalGRPOLoss:
        """The loss; ``ConfigError`` where a setting does not fit."""
        try:
            spec = LossSpec(
                self.kind,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                dual_clip=self.dual_clip,
                nll_alpha=self.nll_alpha,
                kl=KL("k3", self.kl_beta) if self.kl_beta else None,
                entropy_coef=self.entropy_coef,
            )
            return HierarchicalGRPOLoss(
                spec,
                agg=self.agg,
                norm_tokens=self.norm_tokens,
                level_weight=(self.episode_weight, self.step_weight),
                normalizer=self.normalizer,
            )
        except ValueError as error:
            raise ConfigError(f"[loss] {error}") from error


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Train an adapter (peft) and leave the model as it is. ``target_modules``: as peft takes it;
    ``all-linear`` is all but the head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, expected 0 to below 1")


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """One run.

    ``steps``: rollout batches trained on. ``train_prompts``: groups of a step, over all ranks;
    ``group_size``: trajectories of each. ``max_batches``: rollouts of ``train_prompts`` prompts
    that a step may make in search of groups with something to learn from. ``mini_batches``:
    optimizer updates per step, all but the first off-policy. ``micro_batch_tokens``: of one
    forward; attention over a packed batch costs its square where attention is not flash.
    ``recompute_old_logprobs``: policy ratios are against the trainer's own log-probs before the
    first update, not against those the engine sampled with; ``rollout_weight_cap``: then weigh
    tokens by the ratio of these two, at most so much (truncated importance sampling).
    ``max_live``: episodes at a time, the engine's limit by default. ``device``: ``auto`` is
    accelerate's choice. ``mixed_precision``: ``no`` or ``bf16`` (autocast; weights and optimizer
    stay as they are). ``trackers``: accelerate's, by name, separated by commas. ``branch``: sample
    failed calls again, as groups of the step level; ``max_groups`` of each rank.
    """

    steps: int = 100
    seed: int = 0
    train_prompts: int = 128
    group_size: int = 16
    max_batches: int = 8
    mini_batches: int = 1
    micro_batch_tokens: int = 16384
    share_prefixes: bool = False
    temperature: float = 1.0
    recompute_old_logprobs: bool = False
    rollout_weight_cap: float | None = None
    max_live: int | None = None
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    trackers: str = ""
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    advantages: AdvantagePolicy = field(default_factory=AdvantagePolicy)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    branch: BranchPolicy | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps", "train_prompts", "group_size", "max_batches", "mini_batches",
            "micro_batch_tokens", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 1")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigError(
                f"mixed_precision is {self.mixed_precision!r}, expected 'no' or 'bf16'"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}, expected 0 to 2**63 - 1")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature is {self.temperature}, expected > 0: nothing is learnt from one "
                "greedy trajectory"
            )
        if self.rollout_weight_cap is not None:
            if not self.recompute_old_logprobs:
                raise ConfigError("rollout_weight_cap is set, expected recompute_old_logprobs too")
            if not self.rollout_weight_cap > 0:
                raise ConfigError(f"rollout_weight_cap is {self.rollout_weight_cap}, expected > 0")
