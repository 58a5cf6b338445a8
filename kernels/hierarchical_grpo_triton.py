"""Triton row kernels: one program reads a row of logits once and leaves its gradient in its place.

See ``hierarchical_grpo_rows``, their twin, for the mathematics.

Legend: C rows of a chunk, V vocabulary.
"""

# Triton has no type information, and a kernel's pointers have no Python type.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .hierarchical_grpo_passes import LOG2E, sums_of_row, write_gradient
from .hierarchical_grpo_rows import NO_SHIFT_YET, Anchors, GradientTerms, Sums, Weights

__all__ = [
    "INTERPRETED",
    "in_place_of",
    "logit_gradients_kernel",
    "logit_gradients_triton",
    "row_sums_kernel",
    "row_sums_triton",
    "split_gradients_triton",
]

# Of the sizes tried (docs/decisions/0013) the one where every variant of every kernel stays within
# 64 registers, so that four programs share a multiprocessor. One size for all of them: how a sum is
# split decides its last bits, and log-probs are to be the same with and without entropy.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def row_sums_kernel(
    logits_ptr,  # [C, V] float32, bfloat16 or float16, rows row_stride apart
    weights_ptr,  # [C, V], rows weights_stride apart; may begin where the logits do; or None
    column_ptr,  # [C] int64: the target's, or -1
    anchor_ptr,  # [C] float32
    lost_ptr,  # [C] uint8
    ignored_ptr,  # [C] uint8
    inverse_temperature_ptr,  # [C] float32
    bias_ptr,  # [V], or None
    rows_ptr,  # [C] int64: which of the logits' rows; or None: the first C
    total_ptr,  # [C] float32
    moment_ptr,  # [C] float32, or None
    shift_ptr,  # [C] float32
    rounding_ptr,  # [C] float32: what rounding takes from the weights' sum; or None
    row_stride,
    weights_stride,
    vocab,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
    no_shift_yet: tl.constexpr,
    block: tl.constexpr,
):
    """A row's sums, and its weights, 0 at the target, in the place of its logits."""
    # int64 before the product: C * V passes 2^31 at a few thousand rows of a large vocabulary.
    row = tl.program_id(0).to(tl.int64)
    if rows_ptr is None:
        logits_ptr += row * row_stride
    else:
        logits_ptr += tl.load(rows_ptr + row) * row_stride
    if weights_ptr is not None:
        weights_ptr += row * weights_stride
    target = tl.load(column_ptr + row).to(tl.int32)
    anchor = tl.load(anchor_ptr + row)
    lost = tl.load(lost_ptr + row) != 0
    wanted = tl.load(ignored_ptr + row) == 0
    scale = tl.load(inverse_temperature_ptr + row) * LOG2E
    total, moment, shift, rounding = sums_of_row(
        logits_ptr,
        weights_ptr,
        bias_ptr,
        target,
        anchor,
        lost,
        wanted,
        scale,
        vocab,
        logit_scale,
        softcap,
        has_softcap,
        moment_ptr is not None,
        rounding_ptr is not None,
        no_shift_yet,
        block,
        None,
    )
    tl.store(total_ptr + row, total)
    tl.store(shift_ptr + row, shift)
    if rounding_ptr is not None:
        tl.store(rounding_ptr + row, rounding)
    if moment_ptr is not None:
        tl.store(moment_ptr + row, moment)


@triton.jit
def logit_gradients_kernel(
    logits_ptr,  # [C, V] float32, bfloat16 or float16, rows row_stride apart
    gradients_ptr,  # [C, V], rows gradients_stride apart; may begin where the logits do
    index_ptr,  # [C] int64: which of the terms are a row's, or -1 for no gradient; None: its own
    column_ptr,  # [N] int64: the target's, or -1, or SILENT
    anchor_ptr,  # [N] float32, as all that follow
    log_whole_ptr,
    rest_ptr,
    inverse_temperature_ptr,
    by_logp_ptr,
    entropy_ptr,  # or None, with the next
    by_entropy_ptr,
    bias_ptr,  # [V], or None
    own_ptr,  # [C] float32: takes the target's gradient, which is 0 in its row; or None
    rounding_ptr,  # [C] float32: what rounding takes from the gradients' sum; or None
    factor_ptr,  # [] float32: 1 if nothing is to be read or written; or None
    row_stride,
    gradients_stride,
    vocab,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
    block: tl.constexpr,
):
    """A row's gradient by its logits, or zeros; the logits are read once, or not at all."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    gradients_ptr += row * gradients_stride
    at = row if index_ptr is None else tl.load(index_ptr + row)
    known = tl.maximum(at, 0)
    target = tl.load(column_ptr + known).to(tl.int32)
    speaks = (at >= 0) & (target >= -1)
    anchor = tl.load(anchor_ptr + known)
    rest = tl.load(rest_ptr + known)
    log_whole = tl.load(log_whole_ptr + known) * LOG2E
    inverse_temperature = tl.load(inverse_temperature_ptr + known)
    scale = inverse_temperature * LOG2E
    by_logp = tl.load(by_logp_ptr + known) * inverse_temperature * logit_scale
    entropy = 0.0
    by_entropy = 0.0
    if by_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + known)
        by_entropy = tl.load(by_entropy_ptr + known) * inverse_temperature * logit_scale
    end = vocab
    if factor_ptr is not None:
        end = tl.where(tl.load(factor_ptr) == 1.0, 0, vocab)
    own, rounding = write_gradient(
        logits_ptr,
        gradients_ptr,
        bias_ptr,
        tl.where(speaks, end, 0),
        end,
        target,
        anchor,
        scale,
        log_whole,
        rest,
        by_logp,
        entropy,
        by_entropy,
        vocab,
        logit_scale,
        softcap,
        has_softcap,
        by_entropy_ptr is not None,
        own_ptr is not None,
        rounding_ptr is not None,
        index_ptr is None,
        block,
        None,
    )
    if own_ptr is not None:
        tl.store(own_ptr + row, own)
    if rounding_ptr is not None:
        tl.store(rounding_ptr + row, rounding)


INTERPRETED = isinstance(row_sums_kernel, InterpretedFunction)
"""True where ``TRITON_INTERPRET=1`` was set at import: kernels run on CPU tensors, slowly."""


def row_sums_triton(
    logits: torch.Tensor,
    anchors: Anchors,
    inverse_temperature: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    weights: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> Sums:
    """As ``row_sums`` of ``(logits + bias) * logit_scale``; one launch, no host sync.

    ``weights`` [C, V] takes the rows' weights; it may be :func:`in_place_of` the logits, which are
    used up then. ``None``: they are not wanted, and the logits stay. ``rows`` [C] int64: which of
    the logits' rows these are; by default all.
    """
    count, vocab = len(anchors.column), logits.shape[1]
    total, shift = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    moment = logits.new_empty(count, dtype=torch.float32) if entropy else None
    rounds = weights is not None and weights.dtype is not torch.float32
    rounding = logits.new_empty(count, dtype=torch.float32) if rounds else None
    if count:
        row_sums_kernel[(count,)](
            logits,
            weights,
            anchors.column.contiguous(),
            anchors.logit.contiguous(),
            anchors.lost.view(torch.uint8),
            anchors.ignored.view(torch.uint8),
            inverse_temperature.contiguous(),
            None if bias is None else bias.contiguous(),
            None if rows is None else rows.contiguous(),
            total,
            moment,
            shift,
            rounding,
            logits.stride(0),
            0 if weights is None else weights.stride(0),
            vocab,
            float(logit_scale),
            1.0 if softcap is None else softcap,
            softcap is not None,
            NO_SHIFT_YET,
            BLOCK,
            num_warps=NUM_WARPS,
        )
    return Sums(total, moment, shift, weights, rounding)


def split_gradients_triton(
    logits: torch.Tensor,
    terms: GradientTerms,
    *,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    gradients: torch.Tensor,
) -> Weights:
    """As ``split_target`` of ``logit_gradients``, through ``(logits + bias) * logit_scale``.

    ``gradients`` [C, V] takes the others'; it may be :func:`in_place_of` the logits.
    """
    own = torch.empty_like(terms.by_logp)
    rounding = None if gradients.dtype is torch.float32 else torch.empty_like(own)
    _launch_gradients(logits, terms, gradients, None, bias, logit_scale, softcap, own, rounding)
    return Weights(gradients, own, rounding, terms.column)


def logit_gradients_triton(
    logits: torch.Tensor,
    terms: GradientTerms,
    *,
    logit_scale: float,
    softcap: float | None,
    index: torch.Tensor,
    gradients: torch.Tensor,
    factor: torch.Tensor | None = None,
) -> None:
    """As ``logit_gradients`` of ``logits * logit_scale``, into ``gradients`` [T, V].

    ``index`` [T] int64 says which of the terms are a row's; -1: its gradient is 0. Where ``factor``
    [] float32 is 1 nothing is read or written, and the host need not know.
    """
    _launch_gradients(
        logits, terms, gradients, index, None, logit_scale, softcap, None, None, factor
    )


def _launch_gradients(
    logits: torch.Tensor,
    terms: GradientTerms,
    gradients: torch.Tensor,
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    own: torch.Tensor | None,
    rounding: torch.Tensor | None,
    factor: torch.Tensor | None = None,
) -> None:
    rows, vocab = logits.shape
    if rows == 0:
        return
    logit_gradients_kernel[(rows,)](
        logits,
        gradients,
        index,
        *(None if part is None else part.contiguous() for part in terms),
        None if bias is None else bias.contiguous(),
        own,
        rounding,
        factor,
        logits.stride(0),
        gradients.stride(0),
        vocab,
        float(logit_scale),
        1.0 if softcap is None else softcap,
        softcap is not None,
        BLOCK,
        num_warps=NUM_WARPS,
    )


def in_place_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C, V] of ``dtype``, no wider than the logits' own, over the first bytes of each row."""
    return logits.view(dtype)[:, : logits.shape[1]]
