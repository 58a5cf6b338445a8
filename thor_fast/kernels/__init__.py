"""Public face of the kernels: fused operations on torch tensors, each with a plain-torch twin.

Importing this package loads torch; Triton is loaded by the first call that runs a Triton kernel.
The sources are the repository's ``kernels/``, which knows nothing of thor_fast.
"""

from __future__ import annotations

from thor_fast.kernels.hierarchical_grpo import fused_linear_grpo
from thor_fast.kernels.hierarchical_grpo_logits import logits_grpo
from thor_fast.kernels.hierarchical_grpo_metrics import Metrics
from thor_fast.kernels.hierarchical_grpo_outputs import LossOutput
from thor_fast.kernels.hierarchical_grpo_plan import Aggregation, Counts, Plan, make_plan
from thor_fast.kernels.hierarchical_grpo_reference import (
    linear_grpo_reference,
    logits_grpo_reference,
)
from thor_fast.kernels.hierarchical_grpo_spec import KL, LossSpec
from thor_fast.kernels.hierarchical_grpo_tokens import register_loss
from thor_fast.kernels.paged_kv_splice import splice
from thor_fast.kernels.paged_kv_splice_builders import (
    approx_plan_drop,
    plan_append,
    plan_compact,
    plan_fork,
    plan_move,
    plan_truncate,
)
from thor_fast.kernels.paged_kv_splice_moves import MoveCounts
from thor_fast.kernels.paged_kv_splice_plan import SplicePlan
from thor_fast.kernels.paged_kv_splice_rotation import Rope
from thor_fast.kernels.paged_kv_splice_view import KVView
from thor_fast.kernels.selected_logprob import IGNORED_TARGET, selected_logprob

__all__ = [
    "IGNORED_TARGET",
    "KL",
    "Aggregation",
    "Counts",
    "KVView",
    "LossOutput",
    "LossSpec",
    "Metrics",
    "MoveCounts",
    "Plan",
    "Rope",
    "SplicePlan",
    "approx_plan_drop",
    "fused_linear_grpo",
    "linear_grpo_reference",
    "logits_grpo",
    "logits_grpo_reference",
    "make_plan",
    "plan_append",
    "plan_compact",
    "plan_fork",
    "plan_move",
    "plan_truncate",
    "register_loss",
    "selected_logprob",
    "splice",
]
