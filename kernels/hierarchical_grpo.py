"""GRPO's loss on two levels, fused with the language model's head: 3 GEMMs, no [T, V] tensor.

A loss that is a sum over tokens of a function of each one's log-prob knows its gradient as soon as
it knows the log-prob. So the forward pass computes both, a chunk of rows at a time: logits
(float32), the vocabulary's stage (``hierarchical_grpo_rows``), the token's stage
(``hierarchical_grpo_tokens``), and the two GEMMs that carry the gradient back to hidden states and
head. Rows that do not count never reach the first GEMM (``hierarchical_grpo_plan``).

Legend: T tokens of the packed batch, H hidden, V vocabulary, N rows that are read, C of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from .hierarchical_grpo_checks import (
    DTYPES,
    Impl,
    check_head,
    check_plan,
    check_targets,
    check_values,
    rows_of_chunk,
    use_triton,
)
from .hierarchical_grpo_chunks import Found, gather, run
from .hierarchical_grpo_metrics import Metrics
from .hierarchical_grpo_plan import LEVELS, Plan, Selection
from .hierarchical_grpo_sources import Given, Head, compute_dtype, gradient_dtype
from .hierarchical_grpo_spec import LossSpec, spec_of
from .hierarchical_grpo_tokens import METRICS, depends_on_advantage

__all__ = ["LossOutput", "fused_linear_grpo", "logits_grpo"]

_DEFAULT = LossSpec()


class LossOutput(NamedTuple):
    """What a call gives."""

    loss: torch.Tensor
    """[] float32 (float64 for such inputs), differentiable."""
    logp: torch.Tensor
    """[T] float32, detached: of the rows that were read, 0 elsewhere."""
    entropy: torch.Tensor
    """[T] float32, detached, in nats: likewise, where ``spec`` asks for it."""
    metrics: Metrics


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
    if vocab_group is not None and spec.entropy_coef:
        raise ValueError(
            f"entropy_coef is {spec.entropy_coef} with a vocab_group, expected 0: the entropy's "
            "gradient is not computed over a split vocabulary"
        )
    check_head(hidden, weight, bias)
    _check_tokens(hidden, targets, plan, old_logp, ref_logp, temperature, spec)
    selection = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    grad = torch.is_grad_enabled()
    loss, logp, entropy, metrics, *_ = _fused_linear_grpo_op(
        hidden,
        weight,
        bias,
        targets,
        list(selection.to(hidden.device)),
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


def logits_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    spec: LossSpec | None = None,
    temperature: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> LossOutput:
    """As :func:`fused_linear_grpo`, for callers that hold ``logits`` [T, V].

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    spec = _DEFAULT if spec is None else spec
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)}, expected (T, V) of float32, "
            "bfloat16, float16 or float64"
        )
    _check_tokens(logits, targets, plan, old_logp, ref_logp, temperature, spec)
    selection = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    loss, logp, entropy, metrics, _ = _logits_grpo_op(
        logits,
        targets,
        list(selection.to(logits.device)),
        old_logp,
        ref_logp,
        temperature,
        spec.text,
        rows_of_chunk(chunk_rows, logits.shape[1]),
        use_triton(impl, logits),
        torch.is_grad_enabled() and logits.requires_grad,
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
    group = _group_of(group_name)
    source = Head(hidden, weight, bias, chosen.rows, group, wanted)
    batch = gather(chosen, targets, old_logp, ref_logp, temperature, spec, compute_dtype(hidden))
    # Autocast would give a bfloat16 GEMM, whose logits are what this library is there to avoid.
    with torch.autocast(hidden.device.type, enabled=False):
        found = run(
            source,
            batch,
            chosen,
            spec,
            chunk_rows=chunk_rows,
            triton=triton,
            want_gradient=any(wanted),
        )
    by_hidden, by_weight, by_bias = source.by_hidden, source.by_weight, source.by_bias
    # Each is a tensor of its own: an operator's outputs may not be one another.
    return (
        *_outputs(found, chosen, hidden.shape[0]),
        hidden.new_zeros(0) if by_hidden is None else by_hidden,
        weight.new_zeros(0) if by_weight is None else by_weight.to(gradient_dtype(weight.dtype)),
        hidden.new_zeros(0)
        if by_bias is None or bias is None
        else by_bias.to(gradient_dtype(bias.dtype)),
    )


@torch.library.custom_op("thor_kernels::logits_grpo", mutates_args=())
def _logits_grpo_op(
    logits: torch.Tensor,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec_text: str,
    chunk_rows: int,
    triton: bool,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec, chosen = spec_of(spec_text), Selection(*selection)
    source = Given(logits, chosen.rows, wanted)
    batch = gather(chosen, targets, old_logp, ref_logp, temperature, spec, compute_dtype(logits))
    with torch.autocast(logits.device.type, enabled=False):
        found = run(
            source, batch, chosen, spec, chunk_rows=chunk_rows, triton=triton, want_gradient=wanted
        )
    by_logits = logits.new_zeros(0) if source.by_logits is None else source.by_logits
    return (*_outputs(found, chosen, logits.shape[0]), by_logits)


def _outputs(
    found: Found, chosen: Selection, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, log-probs and entropies per token, metrics."""
    logp, entropy = (values.new_zeros(tokens) for values in (found.logp, found.entropy))
    logp[chosen.rows], entropy[chosen.rows] = found.logp, found.entropy
    return found.metrics[:, METRICS.index("loss")].sum(), logp, entropy, found.metrics


@_fused_linear_grpo_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    want_hidden, want_weight, want_bias = rest[-3:]
    return (
        *_fake_outputs(hidden),
        _fake_gradient(hidden) if want_hidden else hidden.new_empty(0),
        _fake_gradient(weight) if want_weight else weight.new_empty(0),
        _fake_gradient(bias) if want_bias and bias is not None else hidden.new_empty(0),
    )


@_logits_grpo_op.register_fake
def _(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return (*_fake_outputs(logits), _fake_gradient(logits) if rest[-1] else logits.new_empty(0))


def _fake_gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(leaf, dtype=gradient_dtype(leaf.dtype))


def _fake_outputs(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    compute, tokens = compute_dtype(like), like.shape[0]
    shapes = ((), (tokens,), (tokens,), (LEVELS, len(METRICS)))
    return tuple(like.new_empty(shape, dtype=compute) for shape in shapes)


def _only_the_loss(ctx: Any, output: tuple[torch.Tensor, ...]) -> None:
    """Nothing else has a gradient; and none is made of zeros, [V, H], to be thrown away."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _save_head_gradients(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    _only_the_loss(ctx, output)
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


def _save_logits_gradient(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    _only_the_loss(ctx, output)
    ctx.save_for_backward(output[4])
    ctx.wanted, ctx.parts, ctx.dtype = inputs[-1], len(inputs[2]), inputs[0].dtype


def _logits_backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    scaled = _scaled(grad, by_loss, ctx.dtype) if ctx.wanted else None
    return (scaled, None, [None] * ctx.parts, *(None,) * 7)


_fused_linear_grpo_op.register_autograd(_head_backward, setup_context=_save_head_gradients)
_logits_grpo_op.register_autograd(_logits_backward, setup_context=_save_logits_gradient)


def _group_of(name: str) -> dist.ProcessGroup | None:
    """An operator of torch's takes no group, only its name."""
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


def _check_tokens(
    rows: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec: LossSpec,
) -> None:
    check_plan(rows, plan)
    check_targets(targets)
    if spec.kl is not None and ref_logp is None:
        raise ValueError("ref_logp is None, expected log-probs of the reference for spec.kl")
    check_values(
        rows, targets=targets, old_logp=old_logp, ref_logp=ref_logp, temperature=temperature
    )
