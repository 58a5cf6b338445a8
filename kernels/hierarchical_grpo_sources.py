"""Where logits come from and where their gradient goes: a head over hidden states, or the caller.

Both keep the protocol ``Source`` of ``hierarchical_grpo_chunks``.

Legend: T tokens of the packed batch, H hidden, V vocabulary (of this shard), C rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .hierarchical_grpo_rows import Shard

__all__ = ["Given", "Head", "compute_dtype", "gradient_dtype"]

_HALVES = (torch.bfloat16, torch.float16)


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """Of logits, log-probs and losses."""
    return torch.float64 if like.dtype is torch.float64 else torch.float32


def gradient_dtype(leaf: torch.dtype) -> torch.dtype:
    """Of a gradient until backward: a loss scaler comes only then; float16 underflows before."""
    return torch.float32 if leaf is torch.float16 else leaf


class Head:
    """Logits from hidden states; their gradient goes back to these and to the head."""

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
        self._compute = compute_dtype(hidden)
        self._hidden = hidden
        # On CPU a half-precision head is converted once, not for every chunk.
        self._weight = weight if weight.is_cuda else weight.to(self._compute)
        self.bias = bias
        self._rows = rows
        # float16's range is too small for the rows' weights.
        half = weight.is_cuda and weight.dtype is torch.bfloat16
        self.weights_dtype = torch.bfloat16 if half else self._compute
        vocab = weight.shape[0]
        self.by_hidden = None
        if wanted[0]:
            self.by_hidden = hidden.new_zeros(hidden.shape, dtype=gradient_dtype(hidden.dtype))
        self.by_weight = weight.new_zeros(weight.shape, dtype=self._compute) if wanted[1] else None
        self.by_bias = weight.new_zeros(vocab, dtype=self._compute) if wanted[2] else None

    def logits(self, part: slice) -> torch.Tensor:
        return self._product(self._hidden[self._rows[part]], self._weight.t())

    def take(self, part: slice, weights: torch.Tensor, scale: torch.Tensor | None) -> None:
        column = None if scale is None else scale.unsqueeze(1)
        if self.by_hidden is not None:
            back = self._product(weights, self._weight)
            back = back if column is None else back * column
            if self.shard.group is not None:
                dist.all_reduce(back, group=self.shard.group)
            self.by_hidden[self._rows[part]] = back.to(self.by_hidden.dtype)
        if self.by_weight is not None:
            x = self._hidden[self._rows[part]]
            scaled = (x if column is None else x * column).to(weights.dtype)
            if weights.dtype is self._compute:
                self.by_weight.addmm_(weights.t(), scaled)
            else:
                out = self.by_weight
                torch.addmm(out, weights.t(), scaled, out_dtype=torch.float32, out=out)
        if self.by_bias is not None:
            scaled = weights if column is None else weights * column
            self.by_bias.add_(scaled.sum(dim=0, dtype=self._compute))

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``, accumulated and left in the dtype of the computation."""
        if a.is_cuda and a.dtype is b.dtype and a.dtype in _HALVES:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.to(self._compute), b.to(self._compute))


class Given:
    """Logits that the caller holds."""

    bias: torch.Tensor | None = None

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor, wanted: bool) -> None:
        self._logits = logits
        self._rows = rows
        self.shard = Shard(0, logits.shape[1], None)
        self.weights_dtype = compute_dtype(logits)
        self.by_logits = None
        if wanted:
            self.by_logits = torch.zeros_like(logits, dtype=gradient_dtype(logits.dtype))

    def logits(self, part: slice) -> torch.Tensor:
        # An index makes a copy, as does the conversion: what comes out may be used up.
        return self._logits[self._rows[part]].to(self.weights_dtype)

    def take(self, part: slice, weights: torch.Tensor, scale: torch.Tensor | None) -> None:
        assert self.by_logits is not None
        gradient = weights if scale is None else weights * scale.unsqueeze(1)
        self.by_logits[self._rows[part]] = gradient.to(self.by_logits.dtype)
