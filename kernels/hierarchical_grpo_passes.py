"""What a Triton program does with its row: a pass for the sums, and one for the gradient.

Functions of the kernels in ``hierarchical_grpo_triton``, which take the two apart, and in
``hierarchical_grpo_one_kernel``, which has both.

Legend: V vocabulary.
"""

# Triton has no type information, and a kernel's pointers have no Python type.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LN2", "LOG2E", "sums_of_row", "write_gradient"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
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
def sums_of_row(
    logits_ptr,  # at the row, as the next
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
    has_softcap: tl.constexpr,
    has_moment: tl.constexpr,
    has_rounding: tl.constexpr,
    no_shift_yet: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Total, moment, shift and rounding; and the row's weights where these are wanted."""
    lanes = tl.arange(0, block)

    shift = tl.where(lost, no_shift_yet, 0.0)
    partial = tl.zeros((block,), dtype=tl.float32)
    moment = tl.zeros((block,), dtype=tl.float32)
    rounding = 0.0
    for start in tl.range(0, vocab, block, num_stages=stages):
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
            if has_rounding:
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
            if has_rounding:
                rounding += tl.sum(exact - kept.to(tl.float32), axis=0)
        if has_moment:
            moment += power * tl.where(power > 0.0, distance - shift, 0.0)
    return tl.sum(partial, axis=0), tl.sum(moment, axis=0) * LN2, shift, rounding


@triton.jit
def write_gradient(
    logits_ptr,  # at the row, as the next
    gradients_ptr,
    bias_ptr,
    read,
    end,
    target,
    anchor,
    scale,
    log_whole,  # of two
    rest,
    by_logp,
    entropy,
    by_entropy,
    vocab,
    logit_scale,
    softcap,
    has_softcap: tl.constexpr,
    has_entropy: tl.constexpr,
    has_own: tl.constexpr,
    has_rounding: tl.constexpr,
    in_place: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """The gradient up to column ``read``, zeros up to ``end``; gives own and rounding."""
    lanes = tl.arange(0, block)
    own = tl.zeros((block,), dtype=tl.float32)
    rounding = tl.zeros((block,), dtype=tl.float32)
    for start in tl.range(0, read, block, num_stages=stages):
        columns = start + lanes
        inside = columns < vocab
        logit, slope = _load_logits(
            logits_ptr, bias_ptr, columns, inside, logit_scale, softcap, has_softcap
        )
        score = (logit - anchor) * scale - log_whole  # of two
        chance = tl.exp2(score)
        gradient = tl.where(columns == target, rest, -chance) * by_logp
        if has_entropy:
            spread = tl.where(chance > 0.0, chance * (score * LN2 + entropy), 0.0)
            gradient -= by_entropy * spread
        gradient *= slope
        if has_own:
            mine = columns == target
            own += tl.where(mine, gradient, 0.0)
            gradient = tl.where(mine, 0.0, gradient)
        kept = gradient.to(gradients_ptr.dtype.element_ty)
        if in_place:
            # Gradients may lie over logits that another thread has yet to read.
            tl.debug_barrier()
            tl.store(gradients_ptr + columns, kept, mask=inside)
        else:
            # Nobody reads them soon: the cache's room is for logits.
            tl.store(gradients_ptr + columns, kept, mask=inside, cache_modifier=".cs")
        if has_rounding:
            rounding += tl.where(inside, gradient - kept.to(tl.float32), 0.0)
    for start in range(read, end, block):
        columns = start + lanes
        nothing = tl.zeros((block,), dtype=gradients_ptr.dtype.element_ty)
        tl.store(gradients_ptr + columns, nothing, mask=columns < vocab)
    return tl.sum(own, axis=0), tl.sum(rounding, axis=0)
