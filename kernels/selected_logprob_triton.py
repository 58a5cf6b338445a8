"""Triton row kernel: one program reads one row of float32 logits once and writes one number.

Legend: C rows of a chunk, V vocabulary.
"""

# Triton has no type information, and a kernel's pointers have no Python type.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .selected_logprob_reference import IGNORED_TARGET

__all__ = ["INTERPRETED", "row_logprob_triton", "selected_logprob_row_kernel"]

# 4096 float32 over 8 warps are four 128-bit loads per thread in flight, at 32 registers or so.
BLOCK = 4096
NUM_WARPS = 8

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def selected_logprob_row_kernel(
    logits_ptr,  # [C, V] float32, rows row_stride apart
    targets_ptr,  # [C] int64
    bias_ptr,  # [V] float32, or None
    out_ptr,  # [C] float32
    row_stride,
    vocab,
    inverse_temperature,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    """Target-anchored log-prob of a row; see ``row_logprob_reference`` for the mathematics."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignored:
        tl.store(out_ptr + row, 0.0)
        return
    if (target < 0) | (target >= vocab):
        tl.store(out_ptr + row, float("nan"))
        return

    # int64 before the product: C * V passes 2^31 at a few thousand rows of a large vocabulary.
    logits_ptr += row * row_stride
    anchor = tl.load(logits_ptr + target)
    if bias_ptr is not None:
        anchor += tl.load(bias_ptr + target)
    scale = inverse_temperature * _LOG2E
    lanes = tl.arange(0, block)

    partial = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, vocab, block):
        columns = start + lanes
        logit = tl.load(logits_ptr + columns, mask=columns < vocab, other=float("-inf"))
        if bias_ptr is not None:
            logit += tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0)
        power = tl.exp2((logit - anchor) * scale)
        partial += tl.where((columns != target) & (columns < vocab), power, 0.0)
    total = tl.sum(partial, axis=0)

    if (total < float("inf")) & (anchor < float("inf")):
        # log1p(total): the quotient takes out the rounding of 1 + total (libdevice's log1p is
        # missing from the interpreter, and this form is as accurate).
        one_plus = 1.0 + total
        rounding = tl.where(one_plus == 1.0, 1.0, one_plus - 1.0)
        log1p = tl.where(one_plus == 1.0, total, tl.log(one_plus) * (total / rounding))
        tl.store(out_ptr + row, -log1p)
        return

    # The sum overflowed, or the target's logit is not finite: the two-pass softmax, whose inf and
    # nan come out as torch's do. Rare, so its second and third read cost nothing that matters.
    top = tl.full((block,), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, block):
        columns = start + lanes
        logit = tl.load(logits_ptr + columns, mask=columns < vocab, other=float("-inf"))
        if bias_ptr is not None:
            logit += tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0)
        top = tl.maximum(top, logit)
    peak = tl.max(top, axis=0)
    partial = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, vocab, block):
        columns = start + lanes
        logit = tl.load(logits_ptr + columns, mask=columns < vocab, other=float("-inf"))
        if bias_ptr is not None:
            logit += tl.load(bias_ptr + columns, mask=columns < vocab, other=0.0)
        partial += tl.where(columns < vocab, tl.exp2((logit - peak) * scale), 0.0)
    log_total = tl.log2(tl.sum(partial, axis=0))
    tl.store(out_ptr + row, ((anchor - peak) * scale - log_total) * _LN2)


INTERPRETED = isinstance(selected_logprob_row_kernel, InterpretedFunction)
"""True where ``TRITON_INTERPRET=1`` was set at import: kernels run on CPU tensors, slowly."""


def row_logprob_triton(
    logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """[C] float32; same contract as ``row_logprob_reference``. One launch, no host sync."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    selected_logprob_row_kernel[(rows,)](
        logits,
        targets.contiguous(),
        None if bias is None else bias.float().contiguous(),
        out,
        logits.stride(0),
        vocab,
        1.0 / temperature,
        IGNORED_TARGET,
        BLOCK,
        num_warps=NUM_WARPS,
    )
    return out
