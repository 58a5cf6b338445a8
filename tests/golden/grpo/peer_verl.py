"""verl: ``ppo_loss`` of its engine workers, with the policy loss, KL and entropy it looks up.

Importance weights and rejection masks come from verl's own rollout correction. Log-probs come from
whole float64 logits, but where the case names a temperature: then from verl's fused torch head in
float32.
"""

from __future__ import annotations

import batches
import numpy as np
import torch
from recording import plain_logp, record
from tensordict import TensorDict
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
NOT_OF_THE_ACTOR = ("loss_mode", "dro_beta", "micro_batches", "temperature")


def cases() -> list[tuple[dict[str, object], tuple[str, ...]]]:
    """Settings, and the batches they are run on."""
    both = ("whole", "gap")
    found: list[tuple[dict[str, object], tuple[str, ...]]] = []
    vanilla = [{"loss_mode": "vanilla", "loss_agg_mode": agg} for agg in AGGREGATIONS]
    found += [(settings, (*both, "far")) for settings in vanilla]
    found += [({**vanilla[4], "loss_scale_factor": batches.LONGEST}, both)]
    found += [({**vanilla[i], "micro_batches": 2}, both) for i in (0, 3)]
    found += [({**vanilla[0], "temperature": 0.7}, ("whole",))]
    for mode in ("gspo", "cispo", "geo_mean", "sapo"):
        found += [({"loss_mode": mode, "loss_agg_mode": "seq-mean-token-mean"}, both)]
    found += [({"loss_mode": "gspo", "loss_agg_mode": "token-mean"}, both)]
    unbounded = {"clip_ratio_low": 1.0}
    found += [({"loss_mode": "cispo", "loss_agg_mode": "token-mean", **unbounded}, both)]
    found += [({"loss_mode": "gpg", "loss_agg_mode": "token-mean"}, both)]
    found += [({"loss_mode": "dro", "loss_agg_mode": "token-mean", "dro_beta": 0.3}, both)]
    for kind in ("k1", "k2", "k3", "k1+", "k3+"):
        kl = {"use_kl_loss": True, "kl_loss_type": kind, "kl_loss_coef": 0.05}
        found += [({**vanilla[0], **kl}, ("whole", "far"))]
    found += [({**vanilla[3], "use_kl_loss": True, "kl_loss_coef": 0.05}, both)]
    found += [({**vanilla[i], "entropy_coeff": 0.1}, both) for i in (0, 3)]
    token = {"rollout_is": "token", "rollout_is_threshold": 2.0}
    found += [({**vanilla[0], **token}, both)]
    found += [({**vanilla[0], **token, "rollout_is_batch_normalize": True}, ("whole",))]
    found += [({**vanilla[0], **token, "rollout_is_threshold": "0.5_2.0"}, both)]
    found += [({**vanilla[0], **token, "rollout_is": "sequence"}, both)]
    rejected = {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"}
    found += [({**vanilla[i], **rejected}, both) for i in (0, 3)]
    for mode in ("gspo", "geo_mean", "sapo"):
        found += [({"loss_mode": mode, "loss_agg_mode": "seq-mean-token-mean", **token}, both)]
    return found


def correction(settings: dict[str, object], inputs: dict[str, np.ndarray]):
    """Weights [B, response] or None, and the mask after rejection."""
    asked = {name: value for name, value in settings.items() if name.startswith("rollout_")}
    mask = torch.tensor(inputs["mask"][:, batches.COLUMNS]).long()
    if not asked:
        return None, mask
    old, rollout = (
        torch.tensor(inputs[name][:, batches.COLUMNS], dtype=torch.float64)
        for name in ("old_logp", "rollout_logp")
    )
    found, kept, _ = compute_rollout_correction_and_rejection_mask(old, rollout, mask, **asked)
    return None if found is None else found.batch["rollout_is_weights"], kept


def actor(settings: dict[str, object]) -> ActorConfig:
    """verl's own configuration, with these settings."""
    policy = PolicyLossConfig(loss_mode=settings["loss_mode"], dro_beta=settings.get("dro_beta"))
    others = {
        name: value
        for name, value in (CLIP | settings).items()
        if name not in NOT_OF_THE_ACTOR and not name.startswith("rollout_")
    }
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy,
        **others,
    )


def loss_of(settings: dict[str, object], inputs: dict[str, np.ndarray], rows: slice):
    """See ``recording.LossOf``."""
    weights, mask = correction(settings, inputs)
    temperature = settings.get("temperature")
    dtype = torch.float64 if temperature is None else torch.float32
    config = actor(settings)
    targets = torch.tensor(inputs["targets"][rows])
    advantages = torch.tensor(inputs["advantages"][rows], dtype=dtype)
    fields = {
        "prompts": targets[:, : batches.PROMPT],
        "responses": targets[:, batches.PROMPT :],
        "attention_mask": torch.ones_like(targets),
        "response_mask": mask[rows],
        "advantages": advantages[:, None].expand(-1, mask.shape[1]),
    }
    for ours, theirs in {"old_logp": "old_log_probs", "ref_logp": "ref_log_prob"}.items():
        fields[theirs] = torch.tensor(inputs[ours][rows][:, batches.COLUMNS], dtype=dtype)
    if weights is not None:
        fields["rollout_is_weights"] = weights[rows]
    split = "micro_batches" in settings
    about = {
        "dp_size": 1,
        "batch_num_tokens": int(mask.sum()) if split else None,
        "global_batch_size": batches.B if split else None,
    }

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if temperature is None:
            logp, entropy = plain_logp(hidden, weight, targets)
        else:
            logp, entropy = FusedLinearForPPO()(hidden, weight, targets, temperature)
        data = TensorDict(fields, batch_size=[len(targets)])
        for name, value in about.items():
            data.set_non_tensor(name, value)
        output = {"log_probs": logp.flatten()}
        if config.entropy_coeff:
            output["entropy"] = entropy.flatten()
        return ppo_loss(config, output, data)[0]

    return loss, dtype


if __name__ == "__main__":
    record("verl", "verl", cases(), loss_of)
