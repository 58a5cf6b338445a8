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

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_MOST_POWER = tl.constexpr(86.0)


@triton.jit
def _load_logits(
    logits_ptr,
    bias_ptr,
    columns,
    inside,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
):
    """Logits after bias, scale and softcap, and the softcap's slope; -inf outside."""
    logit = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    logit *= logit_scale
    slope = tl.full(logit.shape, 1.0, dtype=tl.float32)
    if has_softcap:
        # libdevice's tanh is missing from the interpreter.
        capped = 2.0 * tl.sigmoid(2.0 * logit / softcap) - 1.0
        out_of_it = logit == float("-inf")
        slope = tl.where(out_of_it, 0.0, 1.0 - capped * capped)
        logit = tl.where(out_of_it, logit, capped * softcap)
    return tl.where(inside, logit, float("-inf")), slope


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
    scale = tl.load(inverse_temperature_ptr + row) * _LOG2E
    lanes = tl.arange(0, block)

    shift = tl.where(lost, no_shift_yet, 0.0)
    partial = tl.zeros((block,), dtype=tl.float32)
    moment = tl.zeros((block,), dtype=tl.float32)
    rounding = 0.0
    for start in range(0, vocab, block):
        columns = start + lanes
        inside = columns < vocab
        logit, slope = _load_logits(
            logits_ptr, bias_ptr, columns, inside, logit_scale, softcap, has_softcap
        )
        distance = tl.where(columns == target, float("-inf"), (logit - anchor) * scale)
        top = tl.max(distance, axis=0)
        if (top - shift > _MOST_POWER) & (top < float("inf")):
            higher = tl.ceil(top)
            lower = tl.exp2(shift - higher)  # a power of two: exact, or 0
            moment = (moment + partial * (shift - higher)) * lower
            partial *= lower
            if rounding_ptr is not None:
                rounding *= lower
            if weights_ptr is not None:
                for before in range(0, start, block):
                    # A loop with a barrier is not unrolled: it is rare, and its registers are the
                    # kernel's.
                    tl.debug_barrier()
                    at = weights_ptr + before + lanes
                    kept = tl.load(at).to(tl.float32) * lower
                    tl.store(at, kept.to(weights_ptr.dtype.element_ty))
            shift = higher
        power = tl.exp2(distance - shift)
        partial += power
        if weights_ptr is not None:
            # Weights may lie over logits that another thread has yet to read.
            tl.debug_barrier()
            exact = tl.where(wanted, power * slope, 0.0)
            kept = exact.to(weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + columns, kept, mask=inside)
            if rounding_ptr is not None:
                rounding += tl.sum(exact - kept.to(tl.float32), axis=0)
        if moment_ptr is not None:
            moment += power * tl.where(power > 0.0, distance - shift, 0.0)

    tl.store(total_ptr + row, tl.sum(partial, axis=0))
    tl.store(shift_ptr + row, shift)
    if rounding_ptr is not None:
        tl.store(rounding_ptr + row, rounding)
    if moment_ptr is not None:
        tl.store(moment_ptr + row, tl.sum(moment, axis=0) * _LN2)


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
    log_whole = tl.load(log_whole_ptr + known) * _LOG2E
    inverse_temperature = tl.load(inverse_temperature_ptr + known)
    scale = inverse_temperature * _LOG2E
    by_logp = tl.load(by_logp_ptr + known) * inverse_temperature * logit_scale
    if by_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + known)
        by_entropy = tl.load(by_entropy_ptr + known) * inverse_temperature * logit_scale
    lanes = tl.arange(0, block)
    own = tl.zeros((block,), dtype=tl.float32)
    rounding = tl.zeros((block,), dtype=tl.float32)

    read = tl.where(speaks, vocab, 0)
    for start in range(0, read, block):
        columns = start + lanes
        inside = columns < vocab
        logit, slope = _load_logits(
            logits_ptr, bias_ptr, columns, inside, logit_scale, softcap, has_softcap
        )
        score = (logit - anchor) * scale - log_whole  # of two
        chance = tl.exp2(score)
        gradient = tl.where(columns == target, rest, -chance) * by_logp
        if by_entropy_ptr is not None:
            spread = tl.where(chance > 0.0, chance * (score * _LN2 + entropy), 0.0)
            gradient -= by_entropy * spread
        gradient *= slope
        if own_ptr is not None:
            mine = columns == target
            own += tl.where(mine, gradient, 0.0)
            gradient = tl.where(mine, 0.0, gradient)
        kept = gradient.to(gradients_ptr.dtype.element_ty)
        if index_ptr is None:
            # Gradients may lie over logits that another thread has yet to read.
            tl.debug_barrier()
        tl.store(gradients_ptr + columns, kept, mask=inside)
        if rounding_ptr is not None:
            rounding += tl.where(inside, gradient - kept.to(tl.float32), 0.0)
    for start in range(read, vocab, block):
        columns = start + lanes
        nothing = tl.zeros((block,), dtype=gradients_ptr.dtype.element_ty)
        tl.store(gradients_ptr + columns, nothing, mask=columns < vocab)
    if own_ptr is not None:
        tl.store(own_ptr + row, tl.sum(own, axis=0))
    if rounding_ptr is not None:
        tl.store(rounding_ptr + row, tl.sum(rounding, axis=0))


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
) -> None:
    """As ``logit_gradients`` of ``logits * logit_scale``, into ``gradients`` [T, V].

    ``index`` [T] int64 says which of the terms are a row's; -1: its gradient is 0.
    """
    _launch_gradients(logits, terms, gradients, index, None, logit_scale, softcap, None, None)


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
