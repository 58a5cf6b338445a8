"""A call's metrics: one vector on the device, copied to the host once and without waiting."""

from __future__ import annotations

import torch

from .hierarchical_grpo_plan import Plan
from .hierarchical_grpo_tokens import METRICS

__all__ = ["Metrics"]

_SUMS = ("tokens", "loss", "policy_loss", "nll", "kl_loss")
"""Reported as they are; the others as means over the rows that were read."""


class Metrics:
    """Of one call. ``wait`` gives the numbers; until then nothing on the host waits.

    Of a call that a CUDA graph holds, ``wait`` gives those of the last replay.
    """

    def __init__(self, sums: torch.Tensor, plan: Plan) -> None:
        self._plan = plan
        self._copied: torch.cuda.Event | None = None
        if sums.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            # A captured call leaves them on the device: nobody can wait for a captured event.
            self._sums = sums

    def wait(self) -> dict[str, float]:
        """``<level>/<name>`` for both levels, ``episode`` and ``step``.

        ``tokens`` is the number of rows that were read. ``loss``, ``policy_loss``, ``nll`` and
        ``kl_loss`` are parts of the call's loss, weights included. All others are means over the
        rows read, so without those that a loss may skip; 0 where there was none:
        ``logp``, ``ratio``, ``log_ratio``, ``approx_kl`` (k3 against ``old_logp``), the shares
        ``clipped_low``, ``clipped_high``, ``dual_clipped``, ``positive_advantage``, and ``kl``,
        ``entropy``, ``advantage``.
        """
        if self._copied is not None:
            self._copied.synchronize()
        out = {}
        for level, values in zip(("episode", "step"), self._sums.tolist(), strict=True):
            rows = max(values[0], 1.0)
            for name, value in zip(METRICS, values, strict=True):
                out[f"{level}/{name}"] = value if name in _SUMS else value / rows
        out["groups"] = float(self._plan.groups)
        out["groups_without_signal"] = float(self._plan.groups_without_signal)
        return out
