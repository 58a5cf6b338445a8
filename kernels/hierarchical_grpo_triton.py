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

from .hierarchical_grpo_rows import IGNORED_TARGET, NO_SHIFT_YET, Anchors, Sums

__all__ = [
    "INTERPRETED",
    "in_place_of",
    "logit_gradients_kernel",
    "logit_gradients_triton",
    "row_sums_kernel",
    "row_sums_triton",
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
    total_ptr,  # [C] float32
    moment_ptr,  # [C] float32, or None
    shift_ptr,  # [C] float32
    row_stride,
    weights_stride,
    vocab,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
    no_shift_yet: tl.constexpr,
    block: tl.constexpr,
):
    """A row's sums, and its weights in the place of its logits; the target's are not set."""
    # int64 before the product: C * V passes 2^31 at a few thousand rows of a large vocabulary.
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
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
            kept = tl.where(wanted, power * slope, 0.0)
            tl.store(weights_ptr + columns, kept.to(weights_ptr.dtype.element_ty), mask=inside)
        if moment_ptr is not None:
            moment += power * tl.where(power > 0.0, distance - shift, 0.0)

    tl.store(total_ptr + row, tl.sum(partial, axis=0))
    tl.store(shift_ptr + row, shift)
    if moment_ptr is not None:
        tl.store(moment_ptr + row, tl.sum(moment, axis=0) * _LN2)


@triton.jit
def logit_gradients_kernel(
    logits_ptr,  # [C, V] float32, bfloat16 or float16, rows row_stride apart
    gradients_ptr,  # [C, V], rows gradients_stride apart; may begin where the logits do
    targets_ptr,  # [C] int64
    inverse_temperature_ptr,  # [C] float32
    bias_ptr,  # [V], or None
    by_logp_ptr,  # [C] float32
    by_entropy_ptr,  # [C] float32
    row_stride,
    gradients_stride,
    vocab,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient by the logits of a loss that goes through the entropy; the row is read twice."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * row_stride
    gradients_ptr += row * gradients_stride
    lanes = tl.arange(0, block)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    scale = inverse_temperature * _LOG2E

    peak = float("-inf")
    partial = tl.zeros((block,), dtype=tl.float32)
    moment = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, vocab, block):
        columns = start + lanes
        inside = columns < vocab
        logit, _ = _load_logits(
            logits_ptr, bias_ptr, columns, inside, logit_scale, softcap, has_softcap
        )
        higher = tl.maximum(peak, tl.max(logit, axis=0))
        move = tl.where(peak == float("-inf"), 0.0, (peak - higher) * scale)
        lower = tl.exp2(move)
        # The moment is of distances to the peak, which moves too.
        moment = (moment + partial * move) * lower
        partial *= lower
        peak = higher
        distance = (logit - peak) * scale
        # A leading block may be out of the distribution whole: there is no peak yet.
        power = tl.where(logit > float("-inf"), tl.exp2(distance), 0.0)
        partial += power
        moment += tl.where(power > 0.0, power * distance, 0.0)
    total = tl.sum(partial, axis=0)
    log_total = tl.log2(total)
    entropy = (log_total - tl.sum(moment, axis=0) / total) * _LN2

    by_logp = tl.load(by_logp_ptr + row) * inverse_temperature * logit_scale
    by_entropy = tl.load(by_entropy_ptr + row) * inverse_temperature * logit_scale
    for start in range(0, vocab, block):
        columns = start + lanes
        inside = columns < vocab
        logit, slope = _load_logits(
            logits_ptr, bias_ptr, columns, inside, logit_scale, softcap, has_softcap
        )
        score = (logit - peak) * scale - log_total  # of two
        chance = tl.exp2(score)
        spread = tl.where(chance > 0.0, chance * (score * _LN2 + entropy), 0.0)
        own = tl.where(columns == target, by_logp, 0.0)
        gradient = (own - by_logp * chance - by_entropy * spread) * slope
        gradient = tl.where(target == ignored, 0.0, gradient)
        tl.debug_barrier()
        tl.store(gradients_ptr + columns, gradient.to(gradients_ptr.dtype.element_ty), mask=inside)


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
) -> Sums:
    """As ``row_sums`` of ``(logits + bias) * logit_scale``; one launch, no host sync.

    ``weights`` [C, V] takes the rows' weights; it may be :func:`in_place_of` the logits, which are
    used up then. ``None``: they are not wanted, and the logits stay.
    """
    rows, vocab = logits.shape
    total, shift = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    moment = logits.new_empty(rows, dtype=torch.float32) if entropy else None
    if rows:
        row_sums_kernel[(rows,)](
            logits,
            weights,
            anchors.column.contiguous(),
            anchors.logit.contiguous(),
            anchors.lost.view(torch.uint8),
            anchors.ignored.view(torch.uint8),
            inverse_temperature.contiguous(),
            None if bias is None else bias.contiguous(),
            total,
            moment,
            shift,
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
    return Sums(total, moment, shift, logits[:, :0] if weights is None else weights)


def logit_gradients_triton(
    logits: torch.Tensor,
    targets: torch.Tensor,
    inverse_temperature: torch.Tensor,
    by_logp: torch.Tensor,
    by_entropy: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    gradients: torch.Tensor,
) -> torch.Tensor:
    """As ``logit_gradients``, through ``(logits + bias) * logit_scale``, into ``gradients``."""
    rows, vocab = logits.shape
    if rows:
        logit_gradients_kernel[(rows,)](
            logits,
            gradients,
            targets.contiguous(),
            inverse_temperature.contiguous(),
            None if bias is None else bias.contiguous(),
            by_logp.contiguous(),
            by_entropy.contiguous(),
            logits.stride(0),
            gradients.stride(0),
            vocab,
            float(logit_scale),
            1.0 if softcap is None else softcap,
            softcap is not None,
            IGNORED_TARGET,
            BLOCK,
            num_warps=NUM_WARPS,
        )
    return gradients


def in_place_of(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C, V] of ``dtype``, no wider than the logits' own, over the first bytes of each row."""
    return logits.view(dtype)[:, : logits.shape[1]]
