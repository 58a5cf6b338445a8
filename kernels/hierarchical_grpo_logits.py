"""The loss for callers that hold logits: these are read where they lie, and never copied.

Where :func:`_in_one_kernel` says so, the forward reads the rows that count once, for their sums,
and writes the gradient, of the logits' dtype, as for a factor of 1 on the loss. Backward hands it
over; if the factor is another, it first makes it anew from the logits. Elsewhere, and when backward
runs a second time, the gradient is made there: the factor is known, and nothing is rounded twice.
Rows that do not count are not read at all; their gradient is written as zeros.

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
from .hierarchical_grpo_spec import BUILT_IN_LOSSES, LossSpec, spec_of
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
    ``backward`` they must stay as they are. On a GPU a factor on the loss that is known before is
    cheaper in ``make_plan(level_weight=...)``: for a factor of 1 backward has nothing to do.

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
        torch.is_grad_enabled() and logits.requires_grad,
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
    want_gradient: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Loss, log-probs, entropies and metrics; columns [N] and the other terms of the gradient.

    And the gradient for a factor of 1 on the loss [T, V], or nothing [0].
    """
    spec, chosen = spec_of(spec_text), Selection(*selection)
    batch = gather(chosen, targets, old_logp, ref_logp, temperature, spec, compute_dtype(logits))
    chosen = chosen.only(batch.targets != IGNORED_TARGET)
    one_kernel = _in_one_kernel(logits, spec, triton)
    gradient = torch.empty_like(logits) if one_kernel and want_gradient else None
    rows = _rows(logits, chosen, batch, spec, triton, gradient)
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
        logits.new_empty(0) if gradient is None else gradient,
    )


def _in_one_kernel(logits: torch.Tensor, spec: LossSpec, triton: bool) -> bool:
    """Whether the token's stage runs between the two reads of a row.

    It takes a loss by token that the kernel knows, without a gradient through the entropy.
    float16's loss scaler is a factor that is never 1: made in the forward, its gradients would be
    for nothing.
    """
    by_token = spec.kind in BUILT_IN_LOSSES and not spec.by_sequence
    return triton and by_token and not spec.entropy_coef and logits.dtype is not torch.float16


def _rows(
    logits: torch.Tensor,
    chosen: Selection,
    batch: Batch,
    spec: LossSpec,
    triton: bool,
    gradient: torch.Tensor | None,
) -> Rows:
    """Of the rows ``chosen``; ``gradient`` [T, V] is written where there is one."""
    shard = Shard(0, logits.shape[1], None)
    anchors = anchors_of(
        logits, batch.targets, shard, None, spec.logit_scale, spec.softcap, rows=chosen.rows
    )
    inverse = batch.inverse_temperature
    # Also without a gradient: the same log-probs, to the last bit.
    if _in_one_kernel(logits, spec, triton):
        from .hierarchical_grpo_one_kernel import loss_gradients_triton

        index = _index_of(chosen.rows, logits)
        sums = loss_gradients_triton(
            logits, anchors, batch, chosen, spec, index=index, gradients=gradient
        )
    elif triton:
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
            rows=chosen.rows,
        )
    else:
        sums = _sums(logits, chosen.rows, anchors, inverse, spec)
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
    spec, terms = spec_of(spec_text), _terms(column, values, by_loss)
    if not triton or len(rows) == 0:
        gradient = logits.new_zeros(logits.shape)
        for part in _parts(rows, logits):
            mine = terms.part(part)
            here = logit_gradients(_finished(logits, rows[part], spec), mine, softcap=spec.softcap)
            gradient[rows[part]] = (here * spec.logit_scale).to(gradient.dtype)
        return gradient
    from .hierarchical_grpo_triton import logit_gradients_triton

    gradient = logits.new_empty(logits.shape)
    logit_gradients_triton(
        logits,
        terms,
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        index=_index_of(rows, logits),
        gradients=gradient,
    )
    return gradient


@torch.library.custom_op("thor_kernels::logits_grpo_factor", mutates_args=("gradient",))
def _factor_op(
    gradient: torch.Tensor,
    logits: torch.Tensor,
    rows: torch.Tensor,
    column: torch.Tensor,
    values: torch.Tensor,
    by_loss: torch.Tensor,
    spec_text: str,
) -> None:
    """Of a ``gradient`` [T, V] for a factor of 1 makes that for ``by_loss`` [], if it is another.

    From the logits: as many bytes as to multiply it, and nothing is rounded twice.
    """
    if len(rows) == 0:
        return
    from .hierarchical_grpo_triton import logit_gradients_triton

    spec = spec_of(spec_text)
    logit_gradients_triton(
        logits,
        _terms(column, values, by_loss),
        logit_scale=spec.logit_scale,
        softcap=spec.softcap,
        index=_index_of(rows, logits),
        gradients=gradient,
        factor=by_loss,
    )


def _terms(column: torch.Tensor, values: torch.Tensor, by_loss: torch.Tensor) -> GradientTerms:
    terms = GradientTerms(column, *values, *(None,) * (7 - len(values)))
    by_entropy = None if terms.by_entropy is None else terms.by_entropy * by_loss
    return terms._replace(by_logp=terms.by_logp * by_loss, by_entropy=by_entropy)


def _index_of(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[T]: where a row is among ``rows``; -1: it is not."""
    index = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    index[rows] = torch.arange(len(rows), device=logits.device)
    return index


@_logits_grpo_op.register_fake
def _(
    logits: torch.Tensor,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    rows, compute = selection[0].shape[0], compute_dtype(logits)
    spec_text, triton, want_gradient = rest[-3:]
    spec = spec_of(spec_text)
    parts = 7 if spec.entropy_coef else 5
    made = want_gradient and _in_one_kernel(logits, spec, triton)
    return (
        *fake_outputs(logits),
        targets.new_empty(rows, dtype=torch.int64),
        logits.new_empty((parts, rows), dtype=compute),
        torch.empty_like(logits) if made else logits.new_empty(0),
    )


@_gradient_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@_factor_op.register_fake
def _(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    only_the_loss(ctx, output)
    logits, _, selection, *_, spec_text, triton, want_gradient = inputs
    *_, column, values, gradient = output
    ctx.save_for_backward(logits, selection[0], column, values)
    ctx.settings, ctx.parts = (spec_text, triton), len(selection)
    made = want_gradient and _in_one_kernel(logits, spec_of(spec_text), triton)
    # Not saved: whoever gets it may write to it, so it is given away once.
    ctx.gradient = gradient if made else None


def _backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradient, ctx.gradient = ctx.gradient, None
    if not ctx.needs_input_grad[0]:
        gradient = None
    elif gradient is None:
        gradient = _gradient_op(*ctx.saved_tensors, by_loss, *ctx.settings)
    else:
        _factor_op(gradient, *ctx.saved_tensors, by_loss, ctx.settings[0])
    return (gradient, None, [None] * ctx.parts, *(None,) * 6)


_logits_grpo_op.register_autograd(_backward, setup_context=_save)
