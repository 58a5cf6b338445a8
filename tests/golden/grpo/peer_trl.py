"""TRL: ``GRPOTrainer._compute_loss``, called with a stand-in for the trainer.

The stand-in has the attributes the method reads: settings, and an accelerator of one process. Log-
probs come from whole float64 logits, but where the case names the head: then from TRL's own fused
head in float32. The rollout's importance ratio is computed by TRL's own statements, cut out of
``_generate_and_score_completions``, which cannot run without a generation engine.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import batches
import numpy as np
import torch
from recording import plain_logp, record
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.grpo_trainer import GRPOTrainer

DEFAULTS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "beta": 0.0,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "use_bias_correction_kl": False,
    "entropy_coef": 0.0,
    "vllm_importance_sampling_mode": None,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": None,
    "off_policy_mask_threshold": None,
    "gradient_accumulation_steps": 1,
    "advantages": "(B,)",
    "temperature": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
}
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo")
RATIO = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 2.0}


def cases() -> list[tuple[dict[str, object], tuple[str, ...]]]:
    """Settings that are not the defaults, and the batches they are run on."""
    both = ("whole", "gap")
    found: list[tuple[dict[str, object], tuple[str, ...]]] = []
    found += [({"loss_type": kind}, both) for kind in TYPES]
    found += [({"loss_type": "cispo", "epsilon_high": 1.4}, both)]
    by_sequence = {"importance_sampling_level": "sequence"}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        found += [({"loss_type": kind, **by_sequence}, both)]
    found += [({"loss_type": "dapo", "delta": 1.5}, ("whole",))]
    found += [({"loss_type": "grpo", **by_sequence, "delta": 1.5}, ("whole",))]
    found += [({"loss_type": kind, "beta": 0.04}, both) for kind in ("grpo", "dapo", "dr_grpo")]
    found += [({"loss_type": "dapo", "beta": 0.5}, ("far",))]
    found += [({"loss_type": "luspo", **by_sequence, "beta": 0.04}, ("whole",))]
    found += [({"loss_type": kind, "entropy_coef": 0.1}, both) for kind in ("bnpo", "grpo")]
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        ratio = {"vllm_importance_sampling_mode": mode, **RATIO}
        found += [({"loss_type": "dapo", **ratio}, both)]
    for mode in ("sequence_truncate", "token_truncate"):
        ratio = {"vllm_importance_sampling_mode": mode, **RATIO}
        found += [({"loss_type": "dapo", **by_sequence, **ratio}, ("whole",))]
    found += [({"loss_type": "grpo", "off_policy_mask_threshold": 0.1}, both)]
    found += [({"loss_type": "dapo", "advantages": "(B, T)"}, ("whole",))]
    for kind in ("dapo", "grpo"):
        found += [({"loss_type": kind, "gradient_accumulation_steps": 2}, both)]
    head = {"temperature": 0.7, "final_logit_softcapping": 3.0, "logit_scale": 1.5}
    found += [({"loss_type": "dapo", **head}, ("whole",))]
    return found


def trainer(settings: dict[str, object], logp: torch.Tensor, entropy: torch.Tensor):
    """What ``_compute_loss`` needs of the trainer."""
    args = SimpleNamespace(**settings, steps_per_generation=settings["gradient_accumulation_steps"])
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        reduce=lambda values, reduction: values,
        gather=lambda values: values,
    )
    return SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        max_completion_length=batches.LONGEST,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        use_vllm=args.vllm_importance_sampling_mode is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=args.vllm_importance_sampling_mode,
        vllm_importance_sampling_clip_min=args.vllm_importance_sampling_clip_min,
        vllm_importance_sampling_clip_max=args.vllm_importance_sampling_clip_max,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=args.entropy_coef,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None),
    )


def ratio_statements():
    """TRL's computation of the importance ratio, compiled."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions))
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and any("per_token_logps_diff" in ast.unparse(inner) for inner in node.body[:2])
        and "use_vllm" in ast.unparse(node.test)
    ]
    assert len(found) == 1, f"{len(found)} blocks compute the ratio, expected one"
    return compile(ast.Module(body=found[0].body, type_ignores=[]), "trl", "exec")


def head_logp(settings: dict[str, object]):
    """TRL's fused head, on every position."""

    def logp(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
        flat, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1),
            weight,
            None,
            targets.flatten(),
            settings["temperature"],
            16,
            settings["final_logit_softcapping"],
            settings["logit_scale"],
            ("entropy",),
        )
        return flat.view_as(targets), entropy.view_as(targets)

    return logp


def rollout_ratio(stand_in, data: dict[str, torch.Tensor], rollout_logp: torch.Tensor):
    """The rollout's importance ratio, [b, response] or [b, 1]."""
    names = {
        "self": stand_in,
        "torch": torch,
        "math": math,
        "completion_mask": data["completion_mask"],
        "tool_mask": data["tool_mask"],
        "old_per_token_logps": data["old_per_token_logps"],
        "sampling_per_token_logps": rollout_logp,
    }
    exec(ratio_statements(), names)
    return names["vllm_importance_sampling_ratio"]


def loss_of(changed: dict[str, object], inputs: dict[str, np.ndarray], rows: slice):
    """See ``recording.LossOf``."""
    settings = DEFAULTS | changed
    with_head = settings["temperature"] is not None
    dtype = torch.float32 if with_head else torch.float64
    head = head_logp(settings) if with_head else plain_logp
    targets = torch.tensor(inputs["targets"][rows])

    def of(name: str) -> torch.Tensor:
        return torch.tensor(inputs[name][rows][:, batches.COLUMNS], dtype=dtype)

    mask = torch.tensor(inputs["mask"][rows][:, batches.COLUMNS]).long()
    by_sequence = torch.tensor(inputs["advantages"][rows], dtype=dtype)
    data = {
        "prompt_ids": torch.zeros(len(mask), batches.PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), batches.PROMPT, dtype=torch.long),
        "completion_ids": targets[:, batches.COLUMNS],
        "completion_mask": torch.ones_like(mask),
        "tool_mask": mask,
        "advantages": of("token_advantages") if "advantages" in changed else by_sequence,
        "old_per_token_logps": of("old_logp"),
        "ref_per_token_logps": of("ref_logp"),
        "num_items_in_batch": torch.tensor(int(inputs["mask"].sum())),
    }

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp, entropy = (part[:, batches.COLUMNS] for part in head(hidden, weight, targets))
        stand_in = trainer(settings, logp, entropy)
        if stand_in.use_vllm:
            ratio = rollout_ratio(stand_in, data, of("rollout_logp"))
            data["importance_sampling_ratio"] = ratio
        return GRPOTrainer._compute_loss(stand_in, None, data)

    return loss, dtype


if __name__ == "__main__":
    record("trl", "trl", cases(), loss_of)
