"""The loss for callers that hold logits: these are read where they lie, and never copied.

Forward reads the rows that count once, for their sums. Backward reads them once more and writes the
gradient, of the logits' dtype, in one pass: by then the factor on the loss is known, and nothing is
rounded twice. Other rows are not read at all; their gradient is written as zeros.

Legend: T tokens of the packed batch, V vocabulary, N rows that are read, C of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from .hierarchical_grpo_checks import DTYPES, Impl, check_tokens, rows_of_chunk, use_triton
from .hierarchical_grpo_chunks import Batch, Found, by_entropy, gather, parts_of
from .hierarchical_grpo_head import compute_dtype
from .hierarchical_grpo_metrics import Metrics
from .hierarchical_grpo_outputs import LossOutput, fake_outputs, only_the_loss, outputs_of
from .hierarchical_grpo_plan import Plan, Selection
from .hierarchical_grpo_rows import (
    IGNORED_TARGET,
    Anchors,
    GradientTerms,
    Rows,
    Shard,
    Sums,
    anchors_of,
    finish_rows,
    gradient_terms,
    logit_gradients,
    row_sums,
)
from .hierarchical_grpo_spec import LossSpec, spec_of
from .hierarchical_grpo_tokens import depends_on_advantage, token_terms

__all__ = ["logits_grpo"]

_DEFAULT = LossSpec()


def logits_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    spec: LossSpec | None = None,
    temperature: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> LossOutput:
    """As ``fused_linear_grpo``, for callers that hold ``logits`` [T, V].

    They may have any stride between rows; one between columns other than 1 costs a copy. Until
    ``backward`` they must stay as they are.

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    spec = _DEFAULT if spec is None else spec
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)}, expected (T, V) of float32, "
            "bfloat16, float16 or float64"
        )
    check_tokens(logits, targets, plan, old_logp, ref_logp, temperature, spec)
    selection = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    loss, logp, entropy, metrics, *_ = _logits_grpo_op(
        logits if logits.stride(1) == 1 else logits.contiguous(),
        targets,
        list(plan.on(logits.device, selection)),
        old_logp,
        ref_logp,
        temperature,
        spec.text,
        use_triton(impl, logits),
    )
    return LossOutput(loss, logp, entropy, Metrics(metrics, plan))


@torch.library.custom_op("thor_kernels::logits_grpo", mutates_args=())
def _logits_grpo_op(
    logits: torch.Tensor,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec_text: str,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, log-probs, entropies and metrics; columns [N] and the other terms of the gradient."""
    spec, chosen = spec_of(spec_text), Selection(*selection)
    batch = gather(chosen, targets, old_logp, ref_logp, temperature, spec, compute_dtype(logits))
    chosen = chosen.only(batch.targets != IGNORED_TARGET)
    rows = _rows(logits, chosen.rows, batch, spec, triton)
    found = token_terms(rows.logp, batch.old_logp, batch.ref_logp, rows.entropy, chosen, spec)
    entropy = torch.zeros_like(rows.logp) if rows.entropy is None else rows.entropy
    terms = gradient_terms(
        rows,
        batch.inverse_temperature,
        found.derivative,
        by_entropy(chosen, spec, rows.logp.dtype),
    )
    column, *values = (part for part in terms if part is not None)
    return (
        *outputs_of(Found(rows.logp, entropy, found.metrics), chosen, logits.shape[0]),
        column,
        torch.stack(values),
    )


def _rows(
    logits: torch.Tensor, chosen: torch.Tensor, batch: Batch, spec: LossSpec, triton: bool
) -> Rows:
    """Of the rows ``chosen`` [N]."""
    shard = Shard(0, logits.shape[1], None)
    anchors = anchors_of(
        logits, batch.targets, shard, None, spec.logit_scale, spec.softcap, rows=chosen
    )
    inverse = batch.inverse_temperature
    if triton:
        from .hierarchical_grpo_triton import row_sums_triton

        sums = row_sums_triton(
            logits,
            anchors,
            inverse,
            bias=None,
            logit_scale=spec.logit_scale,
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
            weights=None,
            rows=chosen,
        )
    else:
        sums = _sums(logits, chosen, anchors, inverse, spec)
    return finish_rows(sums, anchors, inverse, shard, softcap=spec.softcap)


def _sums(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    anchors: Anchors,
    inverse_temperature: torch.Tensor,
    spec: LossSpec,
) -> Sums:
    """In chunks: here each is a copy, in the dtype of the computation."""
    pieces = [
        row_sums(
            _finished(logits, chosen[part], spec),
            Anchors(*(values[part] for values in anchors)),
            inverse_temperature[part],
            softcap=spec.softcap,
            entropy=spec.needs_entropy,
            weights_dtype=None,
        )
        for part in _parts(chosen, logits)
    ]
    moments = [piece.moment for piece in pieces if piece.moment is not None]
    return Sums(
        total=torch.cat([piece.total for piece in pieces]),
        moment=torch.cat(moments) if moments else None,
        shift=torch.cat([piece.shift for piece in pieces]),
        weights=None,
        rounding=None,
    )


def _parts(chosen: torch.Tensor, logits: torch.Tensor) -> list[slice]:
    """One at least."""
    return parts_of(len(chosen), rows_of_chunk(None, logits.shape[1])) or [slice(0, 0)]


def _finished(logits: torch.Tensor, rows: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    return logits[rows].to(compute_dtype(logits)) * spec.logit_scale


@torch.library.custom_op("thor_kernels::logits_grpo_gradient", mutates_args=())
def _gradient_op(
    logits: torch.Tensor,
    rows: torch.Tensor,
    column: torch.Tensor,
    values: torch.Tensor,
    by_loss: torch.Tensor,
    spec_text: str,
    triton: bool,
) -> torch.Tensor:
    """[T, V] of the logits' dtype: the gradient by them, times ``by_loss`` []."""
    spec = spec_of(spec_text)
    terms = GradientTerms(column, *values, *(None,) * (7 - len(values)))
    by_entropy = None if terms.by_entropy is None else terms.by_entropy * by_loss
    terms = terms._replace(by_logp=terms.by_logp * by_loss, by_entropy=by_entropy)
    if not triton or len(rows) == 0:
        gradient = logits.new_zeros(logits.shape)
        for part in _parts(rows, logits):
            mine = terms.part(part)
            here = logit_gradients(_finished(logits, rows[part], spec), mine, softcap=spec.softcap)
            gradient[rows[part]] = (here * spec.logit_scale).to(gradient.dtype)
        return gradient
    from .hierarchical_grpo_triton import logit_gradients_triton

    gradient = logits.new_empty(logits.shape)
    index = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    index[rows] = torch.arange(len(rows), device=logits.device)
    logit_gradients_triton(
        logits,
        terms,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        index=index,
        gradients=gradient,
    )
    return gradient


@_logits_grpo_op.register_fake
def _(
    logits: torch.Tensor,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    rows, compute = selection[0].shape[0], compute_dtype(logits)
    parts = 7 if spec_of(rest[-2]).entropy_coef else 5
    return (
        *fake_outputs(logits),
        targets.new_empty(rows, dtype=torch.int64),
        logits.new_empty((parts, rows), dtype=compute),
    )


@_gradient_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    only_the_loss(ctx, output)
    logits, _, selection, *_, spec_text, triton = inputs
    ctx.save_for_backward(logits, selection[0], *output[4:])
    ctx.settings, ctx.parts = (spec_text, triton), len(selection)


def _backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradient = None
    if ctx.needs_input_grad[0]:
        gradient = _gradient_op(*ctx.saved_tensors, by_loss, *ctx.settings)
    return (gradient, None, [None] * ctx.parts, *(None,) * 5)


_logits_grpo_op.register_autograd(_backward, setup_context=_save)
