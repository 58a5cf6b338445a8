"""GRPO's loss on two levels, fused with the language model's head: 3 GEMMs, no [T, V] tensor.

A loss that is a sum over tokens of a function of each one's log-prob knows its gradient as soon as
it knows the log-prob. So the forward pass computes both, a chunk of rows at a time: logits
(float32), the vocabulary's stage (``hierarchical_grpo_rows``), the token's stage
(``hierarchical_grpo_tokens``), and the two GEMMs that carry the gradient back to hidden states and
head. Rows that do not count never reach the first GEMM (``hierarchical_grpo_plan``).

Legend: T tokens of the packed batch, H hidden, V vocabulary, N rows that are read, C of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .hierarchical_grpo_checks import (
    Impl,
    check_head,
    check_tokens,
    rows_of_chunk,
    use_triton,
)
from .hierarchical_grpo_chunks import gather, run
from .hierarchical_grpo_head import Head, compute_dtype, gradient_dtype, group_of
from .hierarchical_grpo_metrics import Metrics
from .hierarchical_grpo_outputs import LossOutput, fake_outputs, only_the_loss, outputs_of
from .hierarchical_grpo_plan import Plan, Selection
from .hierarchical_grpo_spec import LossSpec, spec_of
from .hierarchical_grpo_tokens import depends_on_advantage

__all__ = ["fused_linear_grpo"]

_DEFAULT = LossSpec()


def fused_linear_grpo(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    spec: LossSpec | None = None,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> LossOutput:
    """The loss of a packed batch, and its gradient, straight from hidden states.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; row t is the state that predicts
            ``targets[t]``.
        weight: [V, H] of that dtype: the head's matrix. Without ``requires_grad`` (LoRA below a
            frozen head) its GEMM is not run. Of a sharded head (FSDP2), over ranks that hold
            different tokens, give ``weight.full_tensor(grad_placements=[Partial()])``: that sums
            the ranks' gradients, as a plan with :class:`Counts` of all of them needs.
        targets: [T] int64 or int32. ``-100`` makes a row's value and gradient 0; it still counts
            in denominators and, at a ratio of 1, in its sequence's mean.
        plan: from :func:`make_plan`, for T tokens.
        old_logp: [T] float: log-probs under the policy that the ratio is against.
        ref_logp: [T] float; needed with ``spec.kl``.
        spec: the loss; default ``LossSpec()``.
        bias: [V] float, of the head.
        temperature: [T] float > 0: divides the logits in place of ``spec.temperature``.
        vocab_group: the head is split over these ranks, each of which has as many of its rows, in
            the order of ranks, in ``weight`` and ``bias``; all else is the same on all of them.
            Sums are reduced, the gradient of ``hidden`` included.
        chunk_rows: rows whose logits exist at once; default: what fits 4 GiB, at most 8192.
        impl: ``triton`` needs CUDA or ``TRITON_INTERPRET=1``; ``auto`` takes it where tensors are
            on CUDA and ``reference`` elsewhere.

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    spec = _DEFAULT if spec is None else spec
    check_head(hidden, weight, bias)
    check_tokens(hidden, targets, plan, old_logp, ref_logp, temperature, spec)
    selection = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    grad = torch.is_grad_enabled()
    loss, logp, entropy, metrics, *_ = _fused_linear_grpo_op(
        hidden,
        weight,
        bias,
        targets,
        list(plan.on(hidden.device, selection)),
        old_logp,
        ref_logp,
        temperature,
        spec.text,
        "" if vocab_group is None else vocab_group.group_name,
        rows_of_chunk(chunk_rows, weight.shape[0]),
        use_triton(impl, hidden),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    return LossOutput(loss, logp, entropy, Metrics(metrics, plan))


@torch.library.custom_op("thor_kernels::fused_linear_grpo", mutates_args=())
def _fused_linear_grpo_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec_text: str,
    group_name: str,
    chunk_rows: int,
    triton: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    spec, chosen = spec_of(spec_text), Selection(*selection)
    wanted = (want_hidden, want_weight, want_bias)
    head = Head(hidden, weight, bias, chosen.rows, group_of(group_name), wanted)
    batch = gather(chosen, targets, old_logp, ref_logp, temperature, spec, compute_dtype(hidden))
    found = run(
        head, batch, chosen, spec, chunk_rows=chunk_rows, triton=triton, want_gradient=any(wanted)
    )
    by_hidden, by_weight, by_bias = head.by_hidden, head.by_weight, head.by_bias
    # Each is a tensor of its own: an operator's outputs may not be one another.
    return (
        *outputs_of(found, chosen, hidden.shape[0]),
        hidden.new_zeros(0) if by_hidden is None else by_hidden,
        weight.new_zeros(0) if by_weight is None else by_weight.to(gradient_dtype(weight.dtype)),
        hidden.new_zeros(0)
        if by_bias is None or bias is None
        else by_bias.to(gradient_dtype(bias.dtype)),
    )


@_fused_linear_grpo_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    want_hidden, want_weight, want_bias = rest[-3:]
    return (
        *fake_outputs(hidden),
        _fake_gradient(hidden) if want_hidden else hidden.new_empty(0),
        _fake_gradient(weight) if want_weight else weight.new_empty(0),
        _fake_gradient(bias) if want_bias and bias is not None else hidden.new_empty(0),
    )


def _fake_gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(leaf, dtype=gradient_dtype(leaf.dtype))


def _save_head_gradients(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    only_the_loss(ctx, output)
    ctx.save_for_backward(*output[4:])
    ctx.wanted, ctx.parts = inputs[-3:], len(inputs[4])
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in inputs[:3]]


def _scaled(grad: torch.Tensor, by_loss: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float32, and rounded once: a third in bfloat16 would bias every gradient by 0.1 %."""
    out = torch.empty_like(grad, dtype=dtype)
    # Of as many dimensions, or the scalar would be rounded to the gradient's dtype first.
    return torch.mul(grad, by_loss.reshape((1,) * grad.ndim), out=out)


def _head_backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    scaled = [
        _scaled(grad, by_loss, dtype) if wanted else None
        for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return (*scaled, None, [None] * ctx.parts, *(None,) * 10)


_fused_linear_grpo_op.register_autograd(_head_backward, setup_context=_save_head_gradients)
