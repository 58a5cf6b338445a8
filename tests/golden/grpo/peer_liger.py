"""Liger: ``LigerFusedLinearGRPOLoss``, hidden states to gradients in its own float32 arithmetic."""

from __future__ import annotations

import batches
import numpy as np
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from recording import record

DEFAULTS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, "compiled": False}


def cases() -> list[tuple[dict[str, object], tuple[str, ...]]]:
    """Settings, and the batches they are run on."""
    both = ("whole", "gap")
    found: list[tuple[dict[str, object], tuple[str, ...]]] = []
    kinds = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo")
    found += [({"loss_type": kind}, both) for kind in kinds]
    found += [({"loss_type": "cispo", "epsilon_high": 1.4}, both)]
    by_sequence = {"importance_sampling_level": "sequence"}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        found += [({"loss_type": kind, **by_sequence}, both)]
    found += [({"loss_type": kind, "beta": 0.04}, both) for kind in ("grpo", "dapo")]
    found += [({"loss_type": "dapo", "delta": 1.5}, ("whole",))]
    found += [({"loss_type": "dapo", "vllm_is_ratio": "(B, T)"}, both)]
    found += [({"loss_type": "dapo", "temperature": 0.7, "bias": True}, ("whole",))]
    return found


def loss_of(settings: dict[str, object], inputs: dict[str, np.ndarray], rows: slice):
    """See ``recording.LossOf``."""

    def of(name: str) -> torch.Tensor:
        return torch.tensor(inputs[name][rows][:, batches.COLUMNS])

    given = {
        name: value for name, value in settings.items() if name not in ("vllm_is_ratio", "bias")
    }
    fused = LigerFusedLinearGRPOLoss(
        use_ref_model=given.get("beta", 0) != 0,
        max_completion_length=batches.LONGEST,
        **(DEFAULTS | given),
    )
    ratio = (of("old_logp") - of("rollout_logp")).exp().clamp(max=2.0)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fused(
            hidden[:, batches.COLUMNS],
            weight,
            of("targets"),
            of("mask").long(),
            torch.tensor(inputs["advantages"][rows]),
            bias=torch.tensor(inputs["bias"]) if settings.get("bias") else None,
            ref_per_token_logps=of("ref_logp") if fused.use_ref_model else None,
            old_per_token_logps=of("old_logp"),
            vllm_is_ratio=ratio if "vllm_is_ratio" in settings else None,
        )[0]

    return loss, torch.float32


if __name__ == "__main__":
    record("liger", "liger_kernel", cases(), loss_of)
