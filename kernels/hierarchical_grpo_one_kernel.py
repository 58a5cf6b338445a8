"""Sums, the token's stage and the gradient of a row of logits, in one kernel.

The row is read from memory once: of the second read the L2 cache has it, if few enough rows are
under way. So a program takes a multiprocessor for itself (``NUM_WARPS``), which makes as many rows
as there are of these: of 132, with 151,936 entries of 2 bytes each, 40 MB, of an L2 of 50 MB.

:func:`token_stage` is the twin of ``token_terms`` for losses by token. What a call reports comes
from ``token_terms`` alone, with log-probs from this kernel's sums; the twin's loss only says where
it is NaN.

Legend: T tokens of the packed batch, V vocabulary, N rows that are read.
"""

# Triton has no type information, and a kernel's pointers have no Python type.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .hierarchical_grpo_chunks import Batch
from .hierarchical_grpo_passes import LN2, LOG2E, sums_of_row, write_gradient
from .hierarchical_grpo_plan import Selection
from .hierarchical_grpo_rows import NO_SHIFT_YET, Anchors, Sums
from .hierarchical_grpo_spec import LossSpec

__all__ = [
    "BLOCK",
    "NUM_WARPS",
    "STAGES",
    "loss_gradients_kernel",
    "loss_gradients_triton",
    "token_settings",
    "token_stage",
]

# With more than 32 registers, 1024 threads leave no room for a second program.
BLOCK = 8192
NUM_WARPS = 32
# Nobody else's work covers the latency of a program's loads: they are issued a block ahead.
STAGES = 2


@triton.jit
def _log1p(x):
    """The interpreter has no libdevice. ``u - 1`` is what rounding left of ``x``."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _expm1(x):
    """As above: what ``exp`` is off by, ``log`` takes back."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    return tl.where((u > 0.0) & (u < float("inf")), near, u - 1.0)


@triton.jit
def _clamped(values, low, high):
    """NaN passes."""
    return tl.where(values > high, high, tl.where(values < low, low, values))


@triton.jit
def _times(weight, values):
    return tl.where(weight != 0.0, weight * values, 0.0)


@triton.jit
def _ppo(ratio, free, advantage, low, high, dual_clip, delta):
    """A bound of inf is none."""
    bounded = tl.where(ratio > delta, delta, ratio)
    clipped = _clamped(ratio, low, high)
    plain = -advantage * bounded
    other = -advantage * clipped
    loss = tl.where((plain > other) | (plain != plain), plain, other)
    moves = free & (bounded == ratio)
    moves = moves & ~((ratio < low) & (advantage < 0.0)) & ~((ratio > high) & (advantage > 0.0))
    dual = (advantage < 0.0) & (loss > -advantage * dual_clip)
    loss = tl.where(dual, -advantage * dual_clip, loss)
    return loss, tl.where(moves & ~dual, -advantage * ratio, 0.0)


@triton.jit
def _sapo(ratio, free, advantage, positive, other):
    temperature = tl.where(advantage > 0.0, positive, other)
    gate = tl.sigmoid(temperature * (ratio - 1.0))
    slope = 4.0 * gate * (1.0 - gate) * ratio
    return -advantage * 4.0 / temperature * gate, tl.where(free, -advantage * slope, 0.0)


@triton.jit
def _kl(logp, ref_logp, kind: tl.constexpr, clamp_input, clamp_output):
    """The estimate and its derivative by ``logp``."""
    x = ref_logp - logp
    free = tl.abs(x) <= clamp_input
    x = _clamped(x, -clamp_input, clamp_input)
    if kind == "k1":
        value = -x
        slope = x * 0.0 + 1.0
    elif kind == "k2":
        value = x * x / 2.0
        slope = -x
    else:
        grown = _expm1(x)
        value = grown - x
        slope = -grown
    within = tl.abs(value) <= clamp_output
    return _clamped(value, -clamp_output, clamp_output), tl.where(free & within, slope, 0.0)


@triton.jit
def token_stage(
    logp,
    old_logp,
    ref_logp,
    advantage,
    policy_weight,
    term_weight,
    nll_weight,
    kind: tl.constexpr,
    kl_kind: tl.constexpr,  # or None
    log_ratio_clamp,
    low,
    high,
    dual_clip,
    delta,
    positive,
    other,
    nll_alpha,
    beta,
    clamp_input,
    clamp_output,
):
    """A token's loss and its derivative by ``logp``, both with their weights."""
    log_ratio = logp - old_logp
    free = tl.abs(log_ratio) <= log_ratio_clamp
    ratio = tl.exp(_clamped(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    if kind == "ppo":
        policy, slope = _ppo(ratio, free, advantage, low, high, dual_clip, delta)
    elif kind == "cispo":
        slope = -advantage * tl.where(ratio > high, high, ratio)
        policy = _times(slope, logp)
    else:
        policy, slope = _sapo(ratio, free, advantage, positive, other)
    loss = _times(policy_weight, policy) + _times(-nll_alpha * nll_weight, logp)
    derivative = policy_weight * slope - nll_alpha * nll_weight
    if kl_kind is not None:
        kl, kl_slope = _kl(logp, ref_logp, kl_kind, clamp_input, clamp_output)
        loss += beta * term_weight * kl
        derivative += beta * term_weight * kl_slope
    # A clip's derivative is 0 also where its argument is NaN: a broken row is not to pass quietly.
    return loss, tl.where(loss != loss, loss, derivative)


@triton.jit
def _finished(total, shift, anchor, lost, outside):
    """As ``finish_rows``: the log-prob, the logarithm of the whole, and 1 - p of the target."""
    one = tl.where(lost, 0.0, tl.exp2(-shift))
    denominator = one + total
    shifted = tl.log(denominator) + shift * LN2
    log_whole = tl.where((shift == 0.0) & ~lost, _log1p(total), shifted)
    broken = ~(total < float("inf")) | ~(anchor < float("inf")) | (denominator == 0.0)
    logp = tl.where(lost, float("-inf"), -log_whole)
    logp = tl.where(broken | outside, float("nan"), logp)
    return logp, log_whole, tl.where(lost, 1.0, total / denominator)


@triton.jit
def loss_gradients_kernel(
    logits_ptr,  # [T, V] float32 or bfloat16, rows row_stride apart
    gradients_ptr,  # [T, V] of that dtype, rows gradients_stride apart; or None
    index_ptr,  # [T] int64: which of the N a row is, or -1: its gradient is 0
    column_ptr,  # [N] int64: the target's, or -1
    lost_ptr,  # [N] uint8, as the next two
    ignored_ptr,
    outside_ptr,
    anchor_ptr,  # [N] float32, as all that follow
    inverse_temperature_ptr,
    old_logp_ptr,
    ref_logp_ptr,  # or None
    advantage_ptr,
    policy_weight_ptr,
    term_weight_ptr,
    nll_weight_ptr,
    total_ptr,
    moment_ptr,  # or None
    shift_ptr,
    row_stride,
    gradients_stride,
    vocab,
    logit_scale,
    softcap,
    log_ratio_clamp,
    low,
    high,
    dual_clip,
    delta,
    positive,
    other,
    nll_alpha,
    beta,
    clamp_input,
    clamp_output,
    has_softcap: tl.constexpr,
    kind: tl.constexpr,
    kl_kind: tl.constexpr,
    no_shift_yet: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """A row's sums, and the loss's gradient by its logits, or zeros."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    at = tl.load(index_ptr + row)
    known = tl.maximum(at, 0)
    asked = (at >= 0) & (tl.load(ignored_ptr + known) == 0)
    read = tl.where(asked, vocab, 0)
    target = tl.load(column_ptr + known).to(tl.int32)
    anchor = tl.load(anchor_ptr + known)
    lost = tl.load(lost_ptr + known) != 0
    inverse_temperature = tl.load(inverse_temperature_ptr + known)
    scale = inverse_temperature * LOG2E
    total, moment, shift, _ = sums_of_row(
        logits_ptr,
        None,
        None,
        target,
        anchor,
        lost,
        asked,
        scale,
        read,
        logit_scale,
        softcap,
        has_softcap,
        moment_ptr is not None,
        False,
        no_shift_yet,
        block,
        stages,
    )
    tl.store(total_ptr + known, total, mask=at >= 0)
    tl.store(shift_ptr + known, shift, mask=at >= 0)
    if moment_ptr is not None:
        tl.store(moment_ptr + known, moment, mask=at >= 0)
    if gradients_ptr is not None:
        outside = tl.load(outside_ptr + known) != 0
        logp, log_whole, rest = _finished(total, shift, anchor, lost, outside)
        ref_logp = logp
        if ref_logp_ptr is not None:
            ref_logp = tl.load(ref_logp_ptr + known)
        _, by_logp = token_stage(
            logp,
            tl.load(old_logp_ptr + known),
            ref_logp,
            tl.load(advantage_ptr + known),
            tl.load(policy_weight_ptr + known),
            tl.load(term_weight_ptr + known),
            tl.load(nll_weight_ptr + known),
            kind,
            kl_kind,
            log_ratio_clamp,
            low,
            high,
            dual_clip,
            delta,
            positive,
            other,
            nll_alpha,
            beta,
            clamp_input,
            clamp_output,
        )
        write_gradient(
            logits_ptr,
            gradients_ptr + row * gradients_stride,
            None,
            read,
            vocab,
            target,
            anchor,
            scale,
            log_whole * LOG2E,
            rest,
            by_logp * inverse_temperature * logit_scale,
            0.0,
            0.0,
            vocab,
            logit_scale,
            softcap,
            has_softcap,
            False,
            False,
            False,
            False,
            block,
            stages,
        )


def token_settings(spec: LossSpec) -> dict[str, float]:
    """What :func:`token_stage` takes of a spec, but for the two that decide its code."""
    kl = spec.kl
    positive, other = spec.sapo_temperatures
    return {
        "log_ratio_clamp": spec.log_ratio_clamp,
        "low": 1 - spec.clip_low,
        "high": 1 + spec.clip_high,
        "dual_clip": math.inf if spec.dual_clip is None else spec.dual_clip,
        "delta": math.inf if spec.delta is None else spec.delta,
        "positive": positive,
        "other": other,
        "nll_alpha": spec.nll_alpha,
        "beta": 0.0 if kl is None else kl.beta,
        "clamp_input": math.inf if kl is None else kl.clamp_input,
        "clamp_output": math.inf if kl is None else kl.clamp_output,
    }


def loss_gradients_triton(
    logits: torch.Tensor,
    anchors: Anchors,
    batch: Batch,
    chosen: Selection,
    spec: LossSpec,
    *,
    index: torch.Tensor,
    gradients: torch.Tensor | None,
) -> Sums:
    """The sums of rows ``chosen``, and the loss's gradient by ``logits`` [T, V]; no host sync.

    ``gradients`` [T, V] takes it; ``None``: it is not wanted. ``index`` [T] int64 says which of the
    N a row is; -1: its gradient is 0.
    """
    count, (rows, vocab) = len(anchors.column), logits.shape
    total, shift = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    moment = logits.new_empty(count, dtype=torch.float32) if spec.needs_entropy else None
    if count == 0:
        if gradients is not None:
            gradients.zero_()
        return Sums(total, moment, shift, None, None)
    loss_gradients_kernel[(rows,)](
        logits,
        gradients,
        index,
        anchors.column.contiguous(),
        *(flag.view(torch.uint8) for flag in (anchors.lost, anchors.ignored, anchors.outside)),
        anchors.logit.contiguous(),
        batch.inverse_temperature.contiguous(),
        batch.old_logp.contiguous(),
        None if spec.kl is None or batch.ref_logp is None else batch.ref_logp.contiguous(),
        chosen.advantage,
        chosen.policy_weight,
        chosen.term_weight,
        chosen.nll_weight,
        total,
        moment,
        shift,
        logits.stride(0),
        0 if gradients is None else gradients.stride(0),
        vocab,
        float(spec.logit_scale),
        1.0 if spec.softcap is None else spec.softcap,
        *token_settings(spec).values(),
        has_softcap=spec.softcap is not None,
        kind=spec.kind,
        kl_kind=None if spec.kl is None else spec.kl.kind,
        no_shift_yet=NO_SHIFT_YET,
        block=BLOCK,
        stages=STAGES,
        num_warps=NUM_WARPS,
    )
    return Sums(total, moment, shift, None, None)
