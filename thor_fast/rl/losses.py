"""Hierarchical GRPO (THOR, arXiv 2509.13761) on a packed batch: plan and fused kernels as a module.

A causal model's row t predicts token t + 1 of the same sequence::

    token_ids   p  a  b | q  c  d        row         0  1  2 | 3  4  5
    loss_mask   0  1  1 | 0  0  1        target      a  b  - | c  d  -
                                         is read     1  1  0 | 0  1  0

so what a batch says about a token is moved to the row before it, and each sequence's last row
predicts nothing.

Legend: T tokens of the packed batch, B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from thor_fast.kernels import (
    IGNORED_TARGET,
    Aggregation,
    LossOutput,
    LossSpec,
    Plan,
    fused_linear_grpo,
    make_plan,
)
from thor_fast.rl.batching import TrainingBatch

__all__ = ["HierarchicalGRPOLoss"]


class HierarchicalGRPOLoss(nn.Module):
    """The loss of both levels in one pass over the rows that count; no [T, V] tensor exists.

    Args:
        spec: the token-wise loss and what is added; default ``LossSpec()``, THOR's.
        agg: how tokens are averaged, see ``make_plan``.
        norm_tokens: for ``agg="dr_grpo"`` and ``"seq-mean-token-sum-norm"``: the constant.
        level_weight: of the episode's and the step's mean in the sum.
        normalizer: ``global``: over the whole optimizer step, which is ``TrainingBatch.counts``, or
            this batch where there are none; add the ``plan(batch).counts`` of micro-batches, over
            ranks too, and the micro-batches' losses add up to the single batch's. ``thor``: as
            THOR's code, whose result depends on the split.
        drop_zero_adv: leave out rows without advantage where nothing depends on them.
        chunk_rows: rows whose logits exist at once; default: what fits 4 GiB, at most 8192.
        impl: ``auto``, ``triton`` or ``reference``, see ``fused_linear_grpo``.

    Raises:
        ValueError: a setting does not fit; the message says which.
    """

    def __init__(
        self,
        spec: LossSpec | None = None,
        *,
        agg: Aggregation = "token-mean",
        norm_tokens: int | None = None,
        level_weight: tuple[float, float] = (1.0, 1.0),
        normalizer: Literal["global", "thor"] = "global",
        drop_zero_adv: bool = True,
        chunk_rows: int | None = None,
        impl: Literal["auto", "triton", "reference"] = "auto",
    ) -> None:
        super().__init__()
        self.spec = LossSpec() if spec is None else spec
        self.agg = agg
        self.norm_tokens = norm_tokens
        self.level_weight = level_weight
        self.normalizer = normalizer
        self.drop_zero_adv = drop_zero_adv
        self.chunk_rows = chunk_rows
        self.impl = impl
        self.plan(_EMPTY)  # settings that do not fit are found here, not in the first step

    def plan(self, batch: TrainingBatch) -> Plan:
        """Which rows are read, and with which weights. Runs on the CPU; ``counts`` is part of it.

        Raises:
            ValueError: a shape, dtype or value of the batch does not fit; the message says which.
        """
        if self.normalizer == "thor" and batch.counts is not None:
            raise ValueError("counts are given, expected None with normalizer='thor'")
        tokens = _tokens_of(batch)
        bounds = batch.cu_seqlens.cpu()
        mask = batch.loss_mask.cpu().bool()
        _check_first_tokens(mask, bounds)
        last = _last_rows(bounds, tokens)
        weight = batch.rollout_weight
        return make_plan(
            _moved(mask, tokens) & ~last,
            _moved(torch.as_tensor(batch.level).cpu(), tokens),
            advantages=_moved(batch.advantages.cpu(), tokens),
            cu_seqlens=bounds,
            group=batch.group,
            agg=self.agg,
            norm_tokens=self.norm_tokens,
            level_weight=self.level_weight,
            normalizer=self.normalizer if batch.counts is None else batch.counts,
            mini_batch_sequences=batch.step_sequences,
            drop_zero_adv=self.drop_zero_adv,
            rollout_weight=None if weight is None else _moved(weight.cpu(), tokens),
        )

    def forward(
        self, hidden: torch.Tensor, lm_head: nn.Linear | torch.Tensor, batch: TrainingBatch
    ) -> LossOutput:
        """The loss, differentiable by hidden states and head.

        Args:
            hidden: [T, H] float32, bfloat16, float16 or float64: the last hidden states, row t of
                token t.
            lm_head: the head, or its matrix [V, H] alone; of the dtype of ``hidden``. A ``DTensor``
                is gathered: it is taken for sharded over data-parallel ranks, so its gradient is
                the mean over them, as FSDP2's of all other parameters. With ``counts`` of all
                ranks, multiply the loss by their number.
            batch: see :class:`TrainingBatch`.

        Returns:
            ``loss`` [], ``logp`` and ``entropy`` [T] by row: index t is about token t + 1.
            ``metrics.wait()`` gives the numbers.

        Raises:
            ValueError: a shape, dtype or value does not fit; the message says which.
            TypeError: the head is neither a ``nn.Linear`` nor a tensor.
        """
        plan = self.plan(batch)
        tokens, device = plan.tokens, hidden.device

        def by_row(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else _moved(_sent(values, device), tokens)

        last = _sent(_last_rows(batch.cu_seqlens.cpu(), tokens), device)
        targets = _moved(_sent(batch.token_ids, device), tokens)
        weight, bias = _head(lm_head)
        return fused_linear_grpo(
            hidden,
            weight,
            targets.masked_fill(last, IGNORED_TARGET),
            plan,
            _moved(_sent(batch.old_logprobs, device), tokens),
            by_row(batch.ref_logprobs),
            spec=self.spec,
            bias=bias,
            temperature=by_row(batch.temperature),
            chunk_rows=self.chunk_rows,
            impl=self.impl,
        )


_EMPTY = TrainingBatch(
    token_ids=torch.empty(0, dtype=torch.int64),
    cu_seqlens=torch.zeros(1, dtype=torch.int64),
    loss_mask=torch.empty(0, dtype=torch.bool),
    level=0,
    advantages=torch.empty(0),
    old_logprobs=torch.empty(0),
)


def _tokens_of(batch: TrainingBatch) -> int:
    ids = batch.token_ids
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"token_ids is {ids.dtype} {tuple(ids.shape)}, expected torch.int64 or torch.int32 (T,)"
        )
    tokens = ids.shape[0]
    optional = {
        "loss_mask": batch.loss_mask,
        "old_logprobs": batch.old_logprobs,
        "ref_logprobs": batch.ref_logprobs,
        "rollout_weight": batch.rollout_weight,
        "temperature": batch.temperature,
    }
    for name, values in optional.items():
        if values is not None and values.shape != (tokens,):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, expected ({tokens},) like token_ids"
            )
    return tokens


def _filled(bounds: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where sequences that are not empty begin and end; wrong bounds are for the plan to refuse."""
    if bounds.ndim != 1:
        return (bounds.new_empty(0, dtype=torch.int64),) * 2
    starts, ends = bounds[:-1].long(), bounds[1:].long()
    filled = (starts >= 0) & (starts < ends) & (ends <= tokens)
    return starts[filled], ends[filled]


def _last_rows(bounds: torch.Tensor, tokens: int) -> torch.Tensor:
    """[T] bool: rows that predict nothing."""
    last = torch.zeros(tokens, dtype=torch.bool)
    last[_filled(bounds, tokens)[1] - 1] = True
    return last


def _check_first_tokens(mask: torch.Tensor, bounds: torch.Tensor) -> None:
    starts, _ = _filled(bounds, len(mask))
    wrong = starts[mask[starts]]
    if len(wrong):
        raise ValueError(
            f"loss_mask is set on token {int(wrong[0])}, the first of its sequence, expected 0: "
            "nothing predicts it"
        )


def _moved(values: torch.Tensor, tokens: int) -> torch.Tensor:
    """From tokens to the rows that predict them; what is by sequence, or one for all, stays."""
    return values.roll(-1) if values.shape == (tokens,) else values


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; the host does not wait."""
    if values.device == device or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _head(lm_head: nn.Linear | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matrix and bias, gathered where they are sharded."""
    if isinstance(lm_head, nn.Linear):
        bias = None if lm_head.bias is None else _gathered(lm_head.bias)
        return _gathered(lm_head.weight), bias
    if isinstance(lm_head, torch.Tensor):
        return _gathered(lm_head), None
    kind = type(lm_head)
    raise TypeError(
        f"lm_head is {kind.__module__}.{kind.__name__}, expected torch.nn.Linear or a tensor"
    )


def _gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A ``DTensor`` whole; other tensors as they are."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    # Each rank's gradient is of its own batch: without this hint they would be taken for equal.
    summands = [Partial("sum")] * parameter.device_mesh.ndim
    whole: torch.Tensor = parameter.full_tensor(grad_placements=summands)
    ranks = parameter.device_mesh.size()
    return _ScaledGradient.apply(whole, 1 / ranks)  # type: ignore[no-untyped-call, no-any-return]


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled (gloo has no mean of its own)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None
