"""Log-prob of one chosen token per row, straight from hidden states, without a [T, V] tensor.

``logp[t] = log softmax(f(hidden[t] @ weight.T + bias) / temperature)[targets[t]]``, ``f`` being the
head's scale and softcap.

This is the auditor's op, and gives the old and reference log-probs of a policy update: what an
engine reported when it sampled a trajectory must equal this function of the final hidden states. It
has no gradient. Logits are float32 whatever the inputs are: bfloat16 logits are off by up to 6e-2,
which moves a policy ratio by up to 6 %.

It is the forward half of ``fused_linear_grpo``, by the same code: with the same rows in the same
chunks the log-probs are the same bits, and on-policy ratios are exactly 1.

Legend: T tokens, V vocabulary, H hidden, N rows that are read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .hierarchical_grpo_checks import (
    Impl,
    check_head,
    check_plan,
    check_targets,
    check_values,
    rows_of_chunk,
    use_triton,
)
from .hierarchical_grpo_chunks import Asked, inverse_temperatures, log_probs
from .hierarchical_grpo_head import Head, compute_dtype, group_of
from .hierarchical_grpo_plan import Plan
from .hierarchical_grpo_rows import IGNORED_TARGET
from .hierarchical_grpo_spec import LossSpec, spec_of

__all__ = ["IGNORED_TARGET", "selected_logprob"]


def selected_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Log-prob (natural log) of ``targets`` under the head ``weight``.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; any strides; T may be 0.
        weight: [V, H] of the dtype of ``hidden``: the head's matrix.
        targets: [T] int64 or int32. ``-100`` marks a row nobody asks about: its result is 0.0. Any
            other value outside ``[0, V)`` gives NaN (raising would wait for the device).
        plan: from ``make_plan``: only its trainable rows are computed, all others are 0.0. ``None``
            computes every row.
        temperature: > 0, divides the logits; or one per token, [T] float.
        bias: [V] float, added to the logits. ``-inf`` takes an entry (a padded row of the
            vocabulary) out of the distribution.
        softcap: ``softcap * tanh(logits / softcap)`` before the temperature; > 0, or ``None``.
        logit_scale: multiplies the logits before the softcap; not 0.
        vocab_group: the head is split over these ranks, as in ``fused_linear_grpo``; all of them
            get the result.
        chunk_rows: rows whose logits exist at once; default: what fits 4 GiB, at most 8192, as in
            ``fused_linear_grpo``.
        impl: ``triton`` needs CUDA or ``TRITON_INTERPRET=1``; ``auto`` takes it where tensors are
            on CUDA (and not float64) and ``reference`` elsewhere.

    Returns:
        [T] float32 (float64 for such inputs), at most 0. Special values follow
        ``torch.log_softmax``: a target whose logit is -inf gives -inf; a NaN or +inf anywhere in
        the row, or nothing but -inf, gives NaN.

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    by_token, for_all = None, 1.0
    if isinstance(temperature, torch.Tensor):
        by_token = temperature
    else:
        for_all = float(temperature)
    spec = LossSpec(temperature=for_all, softcap=softcap, logit_scale=logit_scale)
    check_head(hidden, weight, bias)
    if plan is not None:
        check_plan(hidden, plan)
    check_targets(targets)
    check_values(hidden, targets=targets, temperature=by_token)
    if plan is None:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
    else:
        rows = plan.on(hidden.device, plan.trainable).rows
    with torch.no_grad():
        logp: torch.Tensor = _selected_logprob_op(
            hidden,
            weight,
            bias,
            targets,
            rows,
            by_token,
            spec.text,
            "" if vocab_group is None else vocab_group.group_name,
            rows_of_chunk(chunk_rows, weight.shape[0]),
            use_triton(impl, hidden),
        )
    return logp


@torch.library.custom_op("thor_kernels::selected_logprob", mutates_args=())
def _selected_logprob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor | None,
    spec_text: str,
    group_name: str,
    chunk_rows: int,
    triton: bool,
) -> torch.Tensor:
    spec, compute = spec_of(spec_text), compute_dtype(hidden)
    head = Head(hidden, weight, bias, rows, group_of(group_name), (False, False, False))
    inverse = inverse_temperatures(rows, temperature, spec, compute)
    asked = Asked(targets[rows].long(), inverse)
    logp = hidden.new_zeros(hidden.shape[0], dtype=compute)
    logp[rows] = log_probs(head, asked, spec, chunk_rows=chunk_rows, triton=triton)
    return logp


@_selected_logprob_op.register_fake
def _(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
