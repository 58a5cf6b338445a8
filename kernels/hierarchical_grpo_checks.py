"""What the ops of this family ask of their arguments, and their choice of chunk and of kernels.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch

from .hierarchical_grpo_plan import Plan
from .hierarchical_grpo_spec import LossSpec

__all__ = [
    "DTYPES",
    "Impl",
    "check_head",
    "check_plan",
    "check_targets",
    "check_tokens",
    "check_values",
    "rows_of_chunk",
    "use_triton",
]

Impl = Literal["auto", "triton", "reference"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Large enough that a GEMM over one chunk runs at full rate.
_CHUNK_LOGITS_BYTES = 2**32
_MOST_CHUNK_ROWS = 8192


def rows_of_chunk(chunk_rows: int | None, vocab: int) -> int:
    """How many rows' logits exist at once.

    Raises:
        ValueError: the caller's number is not positive.
    """
    if chunk_rows is None:
        return max(1, min(_MOST_CHUNK_ROWS, _CHUNK_LOGITS_BYTES // (4 * vocab)))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected >= 1")
    return chunk_rows


def use_triton(impl: Impl, rows: torch.Tensor) -> bool:
    """Whether ``impl`` means the Triton kernels for rows of this dtype on this device.

    Raises:
        ValueError: it is no such choice, or they cannot run there.
    """
    double = rows.dtype is torch.float64
    if impl == "auto":
        return rows.is_cuda and not double
    if impl == "reference":
        return False
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'triton' or 'reference'")
    if double:
        raise ValueError(
            "impl='triton' got torch.float64, expected float32, bfloat16 or float16: the kernels "
            "compute in float32"
        )
    if not rows.is_cuda:
        from .hierarchical_grpo_triton import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"impl='triton' got tensors on {rows.device}, expected CUDA (or TRITON_INTERPRET=1 "
                "set before the kernels are imported)"
            )
    return True


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Hidden [T, H] and weight [V, H] of one dtype, bias [V], on one device.

    Raises:
        ValueError: something does not fit.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"weight is a {type(weight).__name__}, expected a plain tensor, such as "
            "weight.full_tensor(grad_placements=[Partial()])"
        )
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, H) with V >= 1")
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected (T, {weight.shape[1]}) to match "
            f"weight {tuple(weight.shape)}"
        )
    if hidden.dtype not in DTYPES or weight.dtype is not hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}, expected both of one dtype "
            "of float32, bfloat16, float16, float64"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) to match weight "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.dtype not in (torch.float32, hidden.dtype):
        raise ValueError(f"bias is {bias.dtype}, expected torch.float32 or {hidden.dtype}")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {hidden.device} like hidden")


def check_plan(rows: torch.Tensor, plan: Plan) -> None:
    """As many rows as the plan has tokens.

    Raises:
        ValueError: there are more or fewer.
    """
    if rows.shape[0] != plan.tokens:
        raise ValueError(f"got {rows.shape[0]} rows, expected the plan's {plan.tokens} tokens")


def check_targets(targets: torch.Tensor) -> None:
    """Their dtype.

    Raises:
        ValueError: it is another one.
    """
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets is {targets.dtype}, expected torch.int64 or torch.int32")


def check_values(rows: torch.Tensor, **named: torch.Tensor | None) -> None:
    """One value for each of ``rows`` [T, ...], on their device; ``None`` is none at all.

    Raises:
        ValueError: something does not fit.
    """
    for name, values in named.items():
        if values is None:
            continue
        if values.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, expected ({rows.shape[0]},), one per row"
            )
        if values.device != rows.device:
            raise ValueError(f"{name} is on {values.device}, expected {rows.device} like the rows")


def check_tokens(
    rows: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    temperature: torch.Tensor | None,
    spec: LossSpec,
) -> None:
    """What a loss knows of each of ``rows`` [T, ...].

    Raises:
        ValueError: something does not fit.
    """
    check_plan(rows, plan)
    check_targets(targets)
    if spec.kl is not None and ref_logp is None:
        raise ValueError("ref_logp is None, expected log-probs of the reference for spec.kl")
    check_values(
        rows, targets=targets, old_logp=old_logp, ref_logp=ref_logp, temperature=temperature
    )
