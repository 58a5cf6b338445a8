"""GRPO's loss on two levels, fused with the language model's head: 3 GEMMs, no [T, V] tensor.

A loss that is a sum over tokens of a function of each one's log-prob knows its gradient as soon as
it knows the log-prob. So the forward pass computes both, a chunk of rows at a time: logits
(float32), the vocabulary's stage (``hierarchical_grpo_rows``), the token's stage
(``hierarchical_grpo_tokens``), and the two GEMMs that carry the gradient back to hidden states and
head. Rows that do not count never reach the first GEMM (``hierarchical_grpo_plan``).

Legend: T tokens of the packed batch, H hidden, V vocabulary, N rows that are read, C of a chunk.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .hierarchical_grpo_metrics import Metrics
from .hierarchical_grpo_plan import Plan, Selection
from .hierarchical_grpo_rows import Rows, anchored_rows, logit_gradients
from .hierarchical_grpo_spec import KL, LossSpec
from .hierarchical_grpo_tokens import METRICS, depends_on_advantage, token_terms
from .selected_logprob import Impl, use_triton

__all__ = ["LossOutput", "fused_linear_grpo"]

_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALVES, torch.float64)
# Large enough that a GEMM over one chunk runs at full rate.
_CHUNK_LOGITS_BYTES = 2**32
_MOST_CHUNK_ROWS = 8192


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
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> LossOutput:
    """The loss of a packed batch, and its gradient, straight from hidden states.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; row t is the state that predicts
            ``targets[t]``.
        weight: [V, H] of that dtype: the head's matrix. Without ``requires_grad`` (LoRA below a
            frozen head) its GEMM is not run.
        targets: [T] int64 or int32. ``-100`` makes a row's value and gradient 0.
        plan: from :func:`make_plan`, for T tokens.
        old_logp: [T] float: log-probs under the policy that the ratio is against. For a batch that
            is exactly on policy, the detached ``logp`` of this call's own inputs.
        ref_logp: [T] float; needed with ``spec.kl``.
        spec: the loss; default ``LossSpec()``.
        bias: [V] float, of the head.
        temperature: [T] float > 0: divides the logits in place of ``spec.temperature``.
        chunk_rows: rows whose logits exist at once; default: what fits 4 GiB, at most 8192.
        impl: ``triton`` needs CUDA or ``TRITON_INTERPRET=1``; ``auto`` takes it where tensors are
            on CUDA and ``reference`` elsewhere.

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    spec = LossSpec() if spec is None else spec
    _check(hidden, weight, targets, plan, bias)
    per_token = {"old_logp": old_logp, "ref_logp": ref_logp, "temperature": temperature}
    for name, values in per_token.items():
        if values is not None and values.shape != targets.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, expected {tuple(targets.shape)}"
            )
    if spec.kl is not None and ref_logp is None:
        raise ValueError("ref_logp is None, expected log-probs of the reference for spec.kl")
    selection = plan.select(spec, depends_on_advantage=depends_on_advantage(spec.kind))
    selection = selection.to(hidden.device)
    grad = torch.is_grad_enabled()
    loss, logp, entropy, metrics, *_ = _fused_linear_grpo_op(
        hidden,
        weight,
        bias,
        targets,
        list(selection),
        old_logp,
        ref_logp,
        temperature,
        _text_of(spec),
        _rows_of(chunk_rows, weight.shape[0]),
        use_triton(impl, hidden.device),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    return LossOutput(loss, logp, entropy, Metrics(metrics, plan))


class _Head(NamedTuple):
    """The matrix and what happens to its logits."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    spec: LossSpec
    compute: torch.dtype  # of logits, log-probs and losses
    triton: bool


class _Grads(NamedTuple):
    """Accumulated over chunks; ``None`` where nobody asks."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


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
    spec = _spec_of(spec_text)
    chosen = Selection(*selection)
    compute = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    head = _Head(weight, bias, spec, compute, triton)
    rows = chosen.rows
    batch = _Batch(
        x=hidden[rows],
        targets=targets[rows].long(),
        old_logp=old_logp[rows].to(compute),
        ref_logp=None if ref_logp is None else ref_logp[rows].to(compute),
        inverse_temperature=_inverse(temperature, rows, spec, compute),
    )
    grads = _Grads(
        hidden.new_zeros(hidden.shape) if want_hidden else None,
        weight.new_zeros(weight.shape, dtype=compute) if want_weight else None,
        weight.new_zeros(weight.shape[0], dtype=compute) if want_bias else None,
    )
    wanted = want_hidden or want_weight or want_bias
    logp = hidden.new_zeros(len(rows), dtype=compute)
    entropy = hidden.new_zeros(len(rows), dtype=compute)
    metrics = hidden.new_zeros(2, len(METRICS), dtype=compute)
    derivative = None
    if spec.by_sequence:  # its derivative needs the log-probs of all rows
        for part in _chunks(len(rows), chunk_rows):
            found = _rows(head, batch, part, keep_weights=False)
            logp[part] = found.logp
            if found.entropy is not None:
                entropy[part] = found.entropy
        terms = token_terms(logp, batch.old_logp, batch.ref_logp, entropy, chosen, spec)
        derivative, metrics = terms.derivative, terms.metrics
    for part in _chunks(len(rows), chunk_rows):
        if derivative is not None and not wanted:
            break
        found = _rows(head, batch, part, keep_weights=wanted and not spec.entropy_coef)
        by_logp = None if derivative is None else derivative[part]
        if by_logp is None:
            logp[part] = found.logp
            if found.entropy is not None:
                entropy[part] = found.entropy
            terms = token_terms(
                found.logp,
                batch.old_logp[part],
                None if batch.ref_logp is None else batch.ref_logp[part],
                found.entropy,
                chosen.part(part.start, part.stop),
                spec,
            )
            by_logp, metrics = terms.derivative, metrics + terms.metrics
        if wanted:
            _add_gradients(head, batch, part, found, by_logp, chosen, grads)
    loss = metrics[:, METRICS.index("loss")].sum()
    empty = hidden.new_zeros(0)
    return (
        loss,
        _scattered(logp, rows, hidden.shape[0]),
        _scattered(entropy, rows, hidden.shape[0]),
        metrics,
        empty if grads.hidden is None else grads.hidden,
        empty if grads.weight is None else grads.weight.to(weight.dtype),
        empty if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
    )


class _Batch(NamedTuple):
    """The rows of a call, gathered."""

    x: torch.Tensor
    targets: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor | None
    inverse_temperature: torch.Tensor


def _inverse(
    temperature: torch.Tensor | None, rows: torch.Tensor, spec: LossSpec, dtype: torch.dtype
) -> torch.Tensor:
    if temperature is not None:
        return 1 / temperature[rows].to(dtype)
    return torch.full(rows.shape, 1 / spec.temperature, dtype=dtype, device=rows.device)


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def _product(a: torch.Tensor, b: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """``a @ b``, accumulated and left in ``compute``."""
    if a.is_cuda and a.dtype is b.dtype and a.dtype in _HALVES:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(compute), b.to(compute))


def _logits(head: _Head, x: torch.Tensor) -> torch.Tensor:
    """[C, V] before bias and scale."""
    return _product(x, head.weight.t(), head.compute)


def _finished(head: _Head, logits: torch.Tensor) -> torch.Tensor:
    """With bias and scale; the Triton kernels add them as they read."""
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    return logits if head.spec.logit_scale == 1 else logits.mul_(head.spec.logit_scale)


def _operand_dtype(head: _Head) -> torch.dtype:
    """Of what the gradient's GEMMs read. float16's range is too small for the rows' weights."""
    half = head.weight.is_cuda and head.weight.dtype is torch.bfloat16
    return torch.bfloat16 if half else head.compute


def _rows(head: _Head, batch: _Batch, part: slice, *, keep_weights: bool) -> Rows:
    logits = _logits(head, batch.x[part])
    targets, inverse_temperature = batch.targets[part], batch.inverse_temperature[part]
    softcap, entropy = head.spec.softcap, head.spec.needs_entropy
    if not head.triton:
        logits = _finished(head, logits)
        return anchored_rows(logits, targets, inverse_temperature, softcap=softcap, entropy=entropy)
    from .hierarchical_grpo_triton import anchored_rows_triton, in_place_of

    return anchored_rows_triton(
        logits,
        targets,
        inverse_temperature,
        bias=head.bias,
        logit_scale=head.spec.logit_scale,
        softcap=softcap,
        entropy=entropy,
        weights=in_place_of(logits, _operand_dtype(head)) if keep_weights else None,
    )


def _through_entropy(
    head: _Head, batch: _Batch, part: slice, by_logp: torch.Tensor, by_entropy: torch.Tensor
) -> torch.Tensor:
    """[C, V]: the gradient by the logits before bias and scale."""
    logits = _logits(head, batch.x[part])
    targets, inverse_temperature = batch.targets[part], batch.inverse_temperature[part]
    softcap = head.spec.softcap
    if not head.triton:
        gradients = logit_gradients(
            _finished(head, logits),
            targets,
            inverse_temperature,
            by_logp,
            by_entropy,
            softcap=softcap,
        )
        return gradients.mul_(head.spec.logit_scale)
    from .hierarchical_grpo_triton import in_place_of, logit_gradients_triton

    return logit_gradients_triton(
        logits,
        targets,
        inverse_temperature,
        by_logp,
        by_entropy,
        bias=head.bias,
        logit_scale=head.spec.logit_scale,
        softcap=softcap,
        gradients=in_place_of(logits, _operand_dtype(head)),
    )


def _add_gradients(
    head: _Head,
    batch: _Batch,
    part: slice,
    found: Rows,
    by_logp: torch.Tensor,
    chosen: Selection,
    grads: _Grads,
) -> None:
    """The two GEMMs that carry the rows' gradient back."""
    x = batch.x[part]
    if head.spec.entropy_coef:
        by_entropy = -head.spec.entropy_coef * chosen.term_weight[part].to(head.compute)
        weights = _through_entropy(head, batch, part, by_logp, by_entropy)
        scaled = x.to(weights.dtype)
        scale = None
    else:
        weights = found.weights
        scale = -by_logp * found.factor * head.spec.logit_scale
        scaled = (x * scale.unsqueeze(1)).to(weights.dtype)
    if grads.hidden is not None:
        back = _product(weights, head.weight, head.compute)
        if scale is not None:
            back *= scale.unsqueeze(1)
        grads.hidden[chosen.rows[part]] = back.to(grads.hidden.dtype)
    if grads.weight is not None:
        if weights.dtype is head.compute:
            grads.weight.addmm_(weights.t(), scaled)
        else:
            torch.addmm(
                grads.weight, weights.t(), scaled, out_dtype=torch.float32, out=grads.weight
            )
    if grads.bias is not None:
        columns = weights if scale is None else weights * scale.unsqueeze(1)
        grads.bias.add_(columns.sum(dim=0, dtype=head.compute))


def _scattered(values: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    out = values.new_zeros(tokens)
    out[rows] = values
    return out


@_fused_linear_grpo_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    selection: list[torch.Tensor],
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec_text: str,
    chunk_rows: int,
    triton: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[torch.Tensor, ...]:
    compute = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    tokens = hidden.shape[0]
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(tokens, dtype=compute),
        hidden.new_empty(tokens, dtype=compute),
        hidden.new_empty(2, len(METRICS), dtype=compute),
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        bias.new_empty(bias.shape) if want_bias and bias is not None else hidden.new_empty(0),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:])
    ctx.wanted = inputs[-3:]
    ctx.parts = len(inputs[4])


def _backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    """Log-probs, entropies and metrics are without gradient: only the loss's arrives here."""
    scaled = [
        grad * by_loss.to(grad.dtype) if wanted else None
        for grad, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, None, [None] * ctx.parts, *(None,) * 9)


_fused_linear_grpo_op.register_autograd(_backward, setup_context=_save_gradients)


def _rows_of(chunk_rows: int | None, vocab: int) -> int:
    if chunk_rows is None:
        return max(1, min(_MOST_CHUNK_ROWS, _CHUNK_LOGITS_BYTES // (4 * vocab)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected >= 1")
    return chunk_rows


def _text_of(spec: LossSpec) -> str:
    """As an operator's argument, which is no object of ours."""
    return json.dumps(asdict(spec))


@lru_cache(maxsize=64)
def _spec_of(text: str) -> LossSpec:
    values = json.loads(text)
    values["kl"] = None if values["kl"] is None else KL(**values["kl"])
    values["sapo_temperatures"] = tuple(values["sapo_temperatures"])
    return LossSpec(**values)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    bias: torch.Tensor | None,
) -> None:
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, H) with V >= 1")
    if hidden.shape != (plan.tokens, weight.shape[1]):
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected ({plan.tokens}, {weight.shape[1]}) "
            "to match the plan and the weight"
        )
    if targets.shape != (plan.tokens,) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected torch.int64 or "
            f"torch.int32 ({plan.tokens},)"
        )
    if hidden.dtype not in _DTYPES or weight.dtype is not hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}, expected both of one dtype "
            "of float32, bfloat16, float16, float64"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    for name, tensor in {"weight": weight, "targets": targets, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {hidden.device} like hidden")
