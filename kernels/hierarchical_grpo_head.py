"""The model's head: logits from hidden states, and their gradient back to these and to itself.

Legend: T tokens of the packed batch, H hidden, V vocabulary (of this shard), C rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)

from .hierarchical_grpo_rows import Shard, Weights

__all__ = ["Head", "compute_dtype", "gradient_dtype", "group_of", "weights_dtype"]

_HALVES = (torch.bfloat16, torch.float16)


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """Of logits, log-probs and losses."""
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def gradient_dtype(leaf: torch.dtype) -> torch.dtype:
    """Of a gradient until backward: a loss scaler comes only then; float16 underflows before."""
    return torch.float32 if leaf is torch.float16 else leaf


def weights_dtype(weight: torch.Tensor) -> torch.dtype:
    """Of the gradient by logits that the GEMMs read: a half where these are fast at it.

    float16's range is too small.
    """
    half = weight.is_cuda and weight.dtype is torch.bfloat16
    return torch.bfloat16 if half else compute_dtype(weight)


def group_of(name: str) -> dist.ProcessGroup | None:
    """An operator of torch's takes no group, only its name."""
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


class Head:
    """Hidden states [T, H] and the head [V, H]; the gradients are gathered here, chunk by chunk."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        group: dist.ProcessGroup | None,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        here = weight.shape[0]
        self.shard = Shard(0, here, None)
        if group is not None:
            ranks = dist.get_world_size(group)
            self.shard = Shard(dist.get_rank(group) * here, ranks * here, group)
        self.weights_dtype = weights_dtype(weight)
        self.device_type = hidden.device.type
        self._compute = compute_dtype(hidden)
        self._hidden = hidden
        # On CPU a half-precision head is converted once, not for every chunk.
        self._weight = weight if weight.is_cuda else weight.to(self._compute)
        self.bias = bias
        self._rows = rows
        self.by_hidden = None
        if wanted[0]:
            self.by_hidden = hidden.new_zeros(hidden.shape, dtype=gradient_dtype(hidden.dtype))
        self.by_weight = weight.new_zeros(weight.shape, dtype=self._compute) if wanted[1] else None
        self.by_bias = weight.new_zeros(here, dtype=self._compute) if wanted[2] else None

    def logits(self, part: slice) -> torch.Tensor:
        """[C, V] of these rows, without the bias, in a tensor of their own."""
        return self._product(self._hidden[self._rows[part]], self._weight.t())

    def take(self, part: slice, weights: Weights, scale: torch.Tensor | None) -> None:
        """The gradient of these rows' logits: ``weights``, by row times ``scale`` [C]."""
        if self.by_hidden is not None:
            self.by_hidden[self._rows[part]] = self._back(weights, scale).to(self.by_hidden.dtype)
        own = weights.own if scale is None else weights.own * scale
        if self.by_weight is not None:
            x = self._hidden[self._rows[part]]
            scaled = x if scale is None else x * scale.unsqueeze(1)
            self._add_product(self.by_weight, weights.others, scaled.to(weights.others.dtype))
            _add_rows(self.by_weight, weights.column, own.unsqueeze(1) * x)
        if self.by_bias is not None:
            others = weights.others if scale is None else weights.others * scale.unsqueeze(1)
            self.by_bias.add_(others.sum(dim=0, dtype=self._compute))
            _add_rows(self.by_bias, weights.column, own)

    def _back(self, weights: Weights, scale: torch.Tensor | None) -> torch.Tensor:
        """[C, H]: to the hidden states."""
        back = self._product(weights.others, self._weight)
        own, rounding = weights.own, weights.rounding
        if rounding is not None:
            if self.shard.group is not None:
                dist.all_reduce(rounding, group=self.shard.group)
            # Where the target is in another shard, that one adds it.
            own = torch.where(weights.column >= 0, own + rounding, 0.0)
        # Not addcmul: whether it rounds in between depends on where in a vector a number falls.
        back += self._weight[weights.column.clamp(min=0)].to(back.dtype).mul_(own.unsqueeze(1))
        if scale is not None:
            back *= scale.unsqueeze(1)
        if self.shard.group is not None:
            dist.all_reduce(back, group=self.shard.group)
        return back

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``, accumulated and left in the dtype of the computation."""
        if a.is_cuda and a.dtype is b.dtype and a.dtype in _HALVES:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.to(self._compute), b.to(self._compute))

    def _add_product(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """``out += a.T @ b``, likewise."""
        if a.is_cuda and a.dtype in _HALVES:
            torch.addmm(out, a.t(), b, out_dtype=torch.float32, out=out)
        else:
            out.addmm_(a.t().to(out.dtype), b.to(out.dtype))


def _add_rows(out: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
    """``out[at] += rows``, in the same order each time; a negative place stands for a row of 0."""
    at = at.clamp(min=0)
    if out.is_cuda:  # where index_put sorts, and index_add takes what comes first
        out.index_put_((at,), rows, accumulate=True)
    else:  # the other way round
        out.index_add_(0, at, rows.to(out.dtype))
