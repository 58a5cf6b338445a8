"""Log-prob of one chosen token per row, straight from hidden states, without a [T, V] tensor.

``logp[t] = log softmax((hidden[t] @ weight.T + bias) / temperature)[targets[t]]``

This is the auditor's op: what an engine reported when it sampled a trajectory must equal this
function of the final hidden states. It has no gradient. Logits exist for ``chunk_tokens`` rows at a
time and are float32 whatever the inputs are: bfloat16 logits are off by up to 6e-2, which moves a
policy ratio by up to 6 %.

Legend: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from .selected_logprob_reference import IGNORED_TARGET, row_logprob_reference

__all__ = ["IGNORED_TARGET", "Impl", "selected_logprob"]

Impl = Literal["auto", "triton", "reference"]

# Large enough that a GEMM over one chunk runs at full rate, small next to a model's weights.
_CHUNK_LOGITS_BYTES = 512 * 2**20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def selected_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Log-prob (natural log) of ``targets`` under the head ``weight``.

    Args:
        hidden: [T, H] float32, bfloat16 or float16; any strides; T may be 0.
        weight: [V, H] of the dtype of ``hidden``: the head's matrix.
        targets: [T] int64 or int32. ``-100`` marks a row nobody asks about: its result is 0.0. Any
            other value outside ``[0, V)`` gives NaN (raising would wait for the device).
        temperature: > 0, divides the logits.
        bias: [V] float32 or the dtype of ``hidden``, added to the logits. ``-inf`` takes an entry
            (a padded row of the vocabulary) out of the distribution.
        chunk_tokens: rows whose logits exist at once; by default what fits in 512 MiB.
        impl: ``triton`` needs CUDA or ``TRITON_INTERPRET=1``; ``auto`` takes it where tensors are
            on CUDA and ``reference`` elsewhere.

    Returns:
        [T] float32, at most 0. Special values follow ``torch.log_softmax``: a target whose logit is
        -inf gives -inf; a NaN or +inf anywhere in the row, or nothing but -inf, gives NaN.

    Raises:
        ValueError: a shape, dtype, device or setting does not fit; the message says which.
    """
    _check(hidden, weight, targets, bias)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")
    vocab = weight.shape[0]
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS_BYTES // (4 * vocab))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected >= 1")
    triton = use_triton(impl, hidden.device)
    with torch.no_grad():
        logp: torch.Tensor = _selected_logprob_op(
            hidden, weight, targets, bias, float(temperature), chunk_tokens, triton
        )
    return logp


@torch.library.custom_op("thor_kernels::selected_logprob", mutates_args=())
def _selected_logprob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    chunk_tokens: int,
    triton: bool,
) -> torch.Tensor:
    if triton:
        from .selected_logprob_triton import row_logprob_triton as row_logprob
    else:
        row_logprob = row_logprob_reference
    tokens = hidden.shape[0]
    out = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    head = _head(weight)
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = _logits(hidden[rows], head)
        out[rows] = row_logprob(logits, targets[rows].to(torch.int64), bias, temperature)
    return out


@_selected_logprob_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    chunk_tokens: int,
    triton: bool,
) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _head(weight: torch.Tensor) -> torch.Tensor:
    """[H, V] operand of the GEMM: as it is on CUDA; on CPU float32, copied once per call."""
    return weight.t() if weight.is_cuda else weight.float().t()


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[C, V] float32, accumulated in float32 and never rounded to the dtype of the inputs."""
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        return torch.mm(hidden, head, out_dtype=torch.float32)
    return torch.mm(hidden.float(), head)


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, H) with V >= 1")
    vocab, width = weight.shape
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected (T, {width}) "
            f"to match weight {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, expected ({hidden.shape[0]},) "
            f"to match hidden {tuple(hidden.shape)}"
        )
    if hidden.dtype not in _DTYPES or weight.dtype is not hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}, expected both of one dtype "
            "of float32, bfloat16, float16"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype}, expected torch.int64 or torch.int32")
    operands = {"weight": weight, "targets": targets}
    if bias is not None:
        if bias.shape != (vocab,):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected ({vocab},) "
                f"to match weight {tuple(weight.shape)}"
            )
        if bias.dtype not in (torch.float32, hidden.dtype):
            raise ValueError(f"bias is {bias.dtype}, expected torch.float32 or {hidden.dtype}")
        operands["bias"] = bias
    for name, tensor in operands.items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {hidden.device} like hidden")


def use_triton(impl: Impl, device: torch.device) -> bool:
    """Whether ``impl`` means the Triton kernels on this device.

    Raises:
        ValueError: it is no such choice, or they cannot run there.
    """
    if impl == "auto":
        return device.type == "cuda"
    if impl == "reference":
        return False
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'triton' or 'reference'")
    if device.type != "cuda":
        from .selected_logprob_triton import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"impl='triton' got tensors on {device}, expected CUDA (or TRITON_INTERPRET=1 "
                "set before the kernels are imported)"
            )
    return True
