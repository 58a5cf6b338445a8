"""From sequences with advantages to new weights: mini-batches, micro-batches, loss, optimizer.

One optimizer update sees one mini-batch. Its micro-batches carry the counts of all of it, over all
ranks, so their gradients add up to the single batch's, however it is split.

Legend: T tokens of a micro-batch, B its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedModel

from thor_fast.errors import TrainingError
from thor_fast.kernels import Counts, LossOutput, selected_logprob
from thor_fast.rl.advantages import TrainingSequence
from thor_fast.rl.batching import TrainingBatch, pack
from thor_fast.rl.forward import hidden_states
from thor_fast.rl.loss_metrics import averaged, merged
from thor_fast.rl.settings import OptimizerSettings, TrainerConfig

__all__ = ["Learner", "mini_batches"]

_NOTHING = Counts(*([(0.0, 0.0)] * 3))


def mini_batches(sequences: Sequence[TrainingSequence], k: int) -> list[list[TrainingSequence]]:
    """``k`` parts, the groups dealt out in turn, so each has its share of both levels; some are
    empty where there are fewer groups.
    """
    numbers = sorted({sequence.group for sequence in sequences})
    part = {number: place % k for place, number in enumerate(numbers)}
    return [[s for s in sequences if part[s.group] == i] for i in range(k)]


class Learner:
    """Model, optimizer and schedule. ``update`` changes the weights, in place."""

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, config: TrainerConfig
    ) -> None:
        self.model = model.to(accelerator.device)
        self.optimizer = _adamw(model, config.optimizer)
        self.schedule = _constant_with_warmup(self.optimizer, config.optimizer.warmup_steps)
        self._accelerator, self._config = accelerator, config
        self._loss = config.loss.module()
        self._head: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def update(self, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
        """One pass over the sequences of this rank, in ``mini_batches`` updates; their metrics.

        Raises ``TrainingError`` for a loss or gradient that is not finite, before it is applied.
        """
        self.model.train()
        c = self._config
        parts = [self._packed(part) for part in mini_batches(sequences, c.mini_batches)]
        if c.recompute_old_logprobs:
            parts = [[self._recomputed(batch) for batch in part] for part in parts]
        updates = [self._optimizer_step(part) for part in parts]
        return averaged([metrics for metrics in updates if metrics])

    def _packed(self, sequences: Sequence[TrainingSequence]) -> list[TrainingBatch]:
        c = self._config
        return pack(
            sequences,
            max_tokens=c.micro_batch_tokens,
            share_prefixes=c.share_prefixes,
            temperature=c.temperature,
            normalizer=c.loss.normalizer,  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _recomputed(self, batch: TrainingBatch) -> TrainingBatch:
        """Old log-probs are the trainer's; what the engine's differ by becomes a weight."""
        hidden = hidden_states(self.model, batch)
        rows = selected_logprob(
            hidden,
            self._head.weight,
            batch.token_ids.roll(-1).to(hidden.device),
            self._loss.plan(batch),
            temperature=1.0 if batch.temperature is None else batch.temperature.to(hidden.device),
            bias=self._head.bias,
        )
        old = rows.roll(1).float().cpu()
        cap, weight = self._config.rollout_weight_cap, None
        if cap is not None:
            drift = torch.where(batch.loss_mask, old - batch.old_logprobs, 0.0)
            weight = drift.exp().clamp(max=cap)
        return replace(batch, old_logprobs=old, rollout_weight=weight)

    def _optimizer_step(self, batches: list[TrainingBatch]) -> dict[str, float]:
        batches = self._with_global_counts(batches)
        metrics = []
        for batch in batches:
            out = self._forward(batch)
            self._accelerator.backward(out.loss)
            metrics.append(out.metrics.wait())
        metrics = gather_object(metrics)
        if not metrics:
            return {}
        for parameter in self._trainable():
            if parameter.grad is not None:
                parameter.grad = self._accelerator.reduce(parameter.grad, "sum")
        found = merged(metrics)
        limit = self._config.optimizer.max_grad_norm
        norm = float(self._accelerator.clip_grad_norm_(self._trainable(), limit))
        found |= {"grad_norm": norm, "lr": float(self.schedule.get_last_lr()[0])}
        _check_finite(found)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def _forward(self, batch: TrainingBatch) -> LossOutput:
        hidden = hidden_states(self.model, batch)
        out: LossOutput = self._loss(hidden, self._head, batch)
        return out

    def _with_global_counts(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Denominators of the mini-batch over all ranks, see ``pack``."""
        if self._config.loss.normalizer == "thor":
            sizes = gather_object([b.step_sequences or 0 for b in batches[:1]])
            return [replace(batch, step_sequences=sum(sizes)) for batch in batches]
        counts = reduce(Counts.__add__, gather_object([b.counts for b in batches[:1]]), _NOTHING)
        return [replace(batch, counts=counts) for batch in batches]

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


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
