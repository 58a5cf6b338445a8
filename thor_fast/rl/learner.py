"""From sequences with advantages to new weights: mini-batches, micro-batches, loss, optimizer.

One optimizer update sees one mini-batch. Its micro-batches carry the counts of all of it, over all
ranks, so their gradients add up to the single batch's, however it is split.

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import nn

from thor_fast.errors import ConfigError, TrainingError
from thor_fast.kernels import Counts, LossOutput, selected_logprob
from thor_fast.rl.advantages import TrainingSequence
from thor_fast.rl.batching import TrainingBatch, pack
from thor_fast.rl.forward import hidden_states
from thor_fast.rl.loss_metrics import averaged, merged
from thor_fast.rl.model_setup import enable_checkpointing, sharded, whole
from thor_fast.rl.settings import OptimizerSettings, TrainerConfig

__all__ = ["Learner", "mini_batches"]

_NOTHING = Counts(*([(0.0, 0.0)] * 3))


def mini_batches(sequences: Sequence[TrainingSequence], k: int) -> list[list[TrainingSequence]]:
    """``k`` parts, the groups dealt out in turn, so each has its share of both levels; some are
    empty where there are fewer groups. Each rank deals out its own.
    """
    numbers = sorted({sequence.group for sequence in sequences})
    part = {number: place % k for place, number in enumerate(numbers)}
    return [[s for s in sequences if part[s.group] == i] for i in range(k)]


class Learner:
    """Model, optimizer and schedule. ``update`` changes the weights, in place.

    ``model``: a causal model, or one in peft's hands, on the accelerator's device.
    """

    def __init__(self, model: Any, accelerator: Accelerator, config: TrainerConfig) -> None:
        _check_head(model.get_output_embeddings())
        self._accelerator, self._config = accelerator, config
        self._loss = config.loss.module()
        # FSDP2 takes the mean over ranks, we want the sum.
        self._share = accelerator.num_processes if accelerator.is_fsdp2 else 1
        self._reference = _reference_of(model) if config.loss.kl_beta else None
        if config.gradient_checkpointing:
            enable_checkpointing(model)
        self.model, self.optimizer = sharded(model, _adamw(model, config.optimizer), accelerator)
        self.schedule = _constant_with_warmup(self.optimizer, config.optimizer.warmup_steps)

    def update(self, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
        """One pass over the sequences of this rank, in ``mini_batches`` updates; their metrics.

        ``updates`` is 0 where no rank has any. Raises ``TrainingError`` for a loss or a gradient
        that is not finite, before it is applied.
        """
        self.model.train()
        parts = [
            [self._prepared(batch) for batch in self._packed(part)]
            for part in mini_batches(sequences, self._config.mini_batches)
        ]
        try:
            updates = [self._optimizer_step(part) for part in parts]
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return averaged([metrics for metrics in updates if metrics])

    def _packed(self, sequences: Sequence[TrainingSequence]) -> list[TrainingBatch]:
        """Micro-batches with the denominators of all ranks, see ``pack``."""
        c = self._config
        batches = pack(
            sequences,
            max_tokens=c.micro_batch_tokens,
            share_prefixes=c.share_prefixes,
            temperature=c.temperature,
            normalizer=c.loss.normalizer,
        )
        filled = self._as_many_as_others(batches)
        if c.loss.normalizer == "thor":
            size = sum(gather_object([b.step_sequences or 0 for b in batches[:1]]))
            return [replace(batch, step_sequences=size) for batch in filled]
        counts = reduce(Counts.__add__, gather_object([b.counts for b in batches[:1]]), _NOTHING)
        return [replace(batch, counts=counts) for batch in filled]

    def _as_many_as_others(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Filled up with batches of nothing: a sharded model runs on all ranks or on none."""
        if not self._accelerator.is_fsdp2:
            return batches
        most = max(gather_object([len(batches)]))
        return [*batches, *[_nothing()] * (most - len(batches))]

    def _prepared(self, batch: TrainingBatch) -> TrainingBatch:
        """With log-probs that the engine does not know: old ones of our own, the reference's."""
        if self._config.recompute_old_logprobs:
            old = self._logprobs(self.model, batch)
            cap, weight = self._config.rollout_weight_cap, None
            if cap is not None:
                drift = torch.where(batch.loss_mask, old - batch.old_logprobs, 0.0)
                weight = drift.exp().clamp(max=cap)
            batch = replace(batch, old_logprobs=old, rollout_weight=weight)
        if self._reference is not None:
            adapted = self._reference is self.model
            with self.model.disable_adapter() if adapted else nullcontext():
                reference = self._logprobs(self._reference, batch)
            batch = replace(batch, ref_logprobs=reference)
        return batch

    @torch.no_grad()
    def _logprobs(self, model: Any, batch: TrainingBatch) -> torch.Tensor:
        """[T] float32 on the CPU, by token; only under the mask."""
        hidden, head = self._hidden_and_head(model, batch)
        temperature = 1.0 if batch.temperature is None else batch.temperature.to(hidden.device)
        targets = batch.token_ids.roll(-1).to(hidden.device)
        plan = self._loss.plan(batch)
        rows = selected_logprob(hidden, whole(head), targets, plan, temperature=temperature)
        by_token: torch.Tensor = rows.roll(1).float().cpu()
        return by_token

    def _hidden_and_head(
        self, model: Any, batch: TrainingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._accelerator.autocast():
            hidden = hidden_states(model, batch)
        weight = model.get_output_embeddings().weight
        if self._config.mixed_precision == "bf16":
            # What autocast would make of the head's product.
            return hidden.bfloat16(), weight.bfloat16()
        return hidden, weight

    def _optimizer_step(self, batches: list[TrainingBatch]) -> dict[str, float]:
        metrics = []
        for batch in batches:
            hidden, head = self._hidden_and_head(self.model, batch)
            out: LossOutput = self._loss(hidden, head, batch)
            self._accelerator.backward(out.loss * self._share)
            metrics.append(out.metrics.wait())
        metrics = gather_object(metrics)
        if not metrics:
            return {}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._add_up(trainable)
        found = merged(metrics)
        limit = self._config.optimizer.max_grad_norm
        norm = float(self._accelerator.clip_grad_norm_(trainable, limit))
        found |= {"grad_norm": norm, "lr": float(self.schedule.get_last_lr()[0])}
        _check_finite(found)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _add_up(self, trainable: Sequence[nn.Parameter]) -> None:
        """Gradients over ranks; each has counted the tokens of all of them."""
        if self._accelerator.num_processes == 1 or self._accelerator.is_fsdp2:
            return
        for parameter in trainable:
            if parameter.grad is None:  # a rank without a sequence
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, "sum")


def _check_head(head: nn.Module) -> None:
    """The loss reads the head's matrix; what else there is would be lost without a word."""
    kind = f"{type(head).__module__}.{type(head).__name__}"
    if type(head) is not nn.Linear:
        raise ConfigError(f"the model's head is {kind}, expected torch.nn.Linear itself")
    if head.bias is not None:
        raise ConfigError("the model's head has a bias, expected none")


def _nothing() -> TrainingBatch:
    """One token that nobody learns from."""
    zero = torch.zeros(1, dtype=torch.int64)
    return TrainingBatch(
        token_ids=zero,
        cu_seqlens=torch.tensor([0, 1]),
        loss_mask=zero.bool(),
        level=0,
        advantages=torch.zeros(1),
        old_logprobs=torch.zeros(1),
    )


def _reference_of(model: Any) -> Any:
    """The model as it is now: behind an adapter it stays, otherwise it is copied."""
    if hasattr(model, "disable_adapter"):
        return model
    return copy.deepcopy(model).requires_grad_(False).eval()


def _adamw(model: nn.Module, o: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
    )


def _constant_with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min(1.0, (update + 1) / (warmup_steps + 1))
    )


def _check_finite(metrics: dict[str, float]) -> None:
    for name in ("loss", "grad_norm"):
        if not abs(metrics[name]) < float("inf"):
            raise TrainingError(f"{name} is {metrics[name]}, expected a finite number")
