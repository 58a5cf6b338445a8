"""verl: ``ppo_loss`` of its engine workers, with the policy loss, KL and entropy it looks up.

Importance weights and rejection masks come from verl's own rollout correction. Log-probs come from
whole float64 logits, but where the case names a temperature: then from verl's fused torch head in
float32.
"""

from __future__ import annotations

import batches
import numpy as np
import torch
from recording import Recording, plain_logp
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


def loss_of(settings: dict[str, object], inputs: dict[str, np.ndarray], rows: slice):
    """The loss of these sequences by all hidden states and the head's weight."""
    weights, mask = correction(settings, inputs)
    parts = settings.get("micro_batches", 1) > 1
    temperature = settings.get("temperature")
    dtype = torch.float64 if temperature is None else torch.float32
    of_actor = {
        name: value
        for name, value in (CLIP | settings).items()
        if name not in NOT_OF_THE_ACTOR and not name.startswith("rollout_")
    }
    policy = PolicyLossConfig(loss_mode=settings["loss_mode"], dro_beta=settings.get("dro_beta"))
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy,
        **of_actor,
    )
    fields = {
        "prompts": torch.tensor(inputs["targets"][rows, : batches.PROMPT]),
        "responses": torch.tensor(inputs["targets"][rows, batches.PROMPT :]),
        "attention_mask": torch.ones(batches.B, batches.L, dtype=torch.long)[rows],
        "response_mask": mask[rows],
        "advantages": torch.tensor(inputs["advantages"][rows], dtype=dtype)[:, None].expand(
            -1, mask.shape[1]
        ),
    }
    for ours, theirs in {"old_logp": "old_log_probs", "ref_logp": "ref_log_prob"}.items():
        fields[theirs] = torch.tensor(inputs[ours][rows][:, batches.COLUMNS], dtype=dtype)
    if weights is not None:
        fields["rollout_is_weights"] = weights[rows]

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        targets = torch.tensor(inputs["targets"][rows])
        if temperature is None:
            logp, entropy = plain_logp(hidden[rows], weight, targets)
        else:
            logp, entropy = FusedLinearForPPO()(hidden[rows], weight, targets, temperature)
        data = TensorDict(fields, batch_size=[len(targets)])
        data.set_non_tensor("dp_size", 1)
        data.set_non_tensor("batch_num_tokens", int(mask.sum()) if parts else None)
        data.set_non_tensor("global_batch_size", batches.B if parts else None)
        output = {"log_probs": logp.flatten()}
        if config.entropy_coeff:
            output["entropy"] = entropy.flatten()
        return ppo_loss(config, output, data)[0]

    return loss, dtype


def main() -> None:
    """Run every case."""
    recording = Recording("verl", "verl")
    everything = batches.make()
    for settings, names in cases():
        for batch in names:
            inputs = batches.choose(everything, batch)
            parts = (2, 3) if "micro_batches" in settings else (batches.B,)
            bounds = np.cumsum((0, *parts))
            made = [
                loss_of(settings, inputs, slice(*pair))
                for pair in zip(bounds, bounds[1:], strict=False)
            ]
            recording.add(
                settings,
                batch,
                inputs,
                lambda hidden, weight, made=made: sum(loss(hidden, weight) for loss, _ in made),
                dtype=made[0][1],
                parts=parts,
            )
    recording.write()


if __name__ == "__main__":
    main()
