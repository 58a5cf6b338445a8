"""Every setting and argument of the loss that is refused, with a message of got and expected."""

from __future__ import annotations

import math

import pytest
import torch

from thor_fast.kernels import KL, LossSpec, fused_linear_grpo, logits_grpo, make_plan

T, H, V = 5, 3, 7


def arguments():
    return {
        "hidden": torch.zeros(T, H),
        "weight": torch.zeros(V, H),
        "targets": torch.zeros(T, dtype=torch.int64),
        "plan": make_plan(
            torch.ones(T, dtype=torch.bool),
            0,
            advantages=torch.ones(1),
            cu_seqlens=torch.tensor([0, T]),
        ),
        "old_logp": torch.zeros(T),
    }


SHARED = [
    ({"targets": torch.zeros(4).long()}, r"targets has shape \(4,\), expected \(5,\), one per row"),
    ({"targets": torch.zeros(T)}, "targets is torch.float32, expected torch.int64 or torch.int32"),
    ({"old_logp": torch.zeros(T, 1)}, r"old_logp has shape \(5, 1\), expected \(5,\), one per row"),
    ({"old_logp": torch.zeros(T, device="meta")}, "old_logp is on meta, expected cpu like the"),
    ({"ref_logp": torch.zeros(6)}, r"ref_logp has shape \(6,\), expected \(5,\), one per row"),
    ({"temperature": torch.ones(())}, r"temperature has shape \(\), expected \(5,\), one per row"),
    ({"spec": LossSpec(kl=KL())}, "ref_logp is None, expected log-probs of the reference for spec"),
    ({"spec": LossSpec(kind="reinforce")}, "kind is 'reinforce', expected one of ppo, cispo, gspo"),
    ({"impl": "cuda"}, "impl is 'cuda', expected 'auto', 'triton' or 'reference'"),
]


class Split(torch.Tensor):
    """As a DTensor, in what is asked of one."""

    def full_tensor(self):
        return self


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SHARED,
        ({"chunk_rows": 0}, "chunk_rows is 0, expected >= 1"),
        ({"weight": torch.zeros(0, H)}, r"weight has shape \(0, 3\), expected \(V, H\) with V >="),
        ({"weight": torch.zeros(V)}, r"weight has shape \(7,\), expected \(V, H\) with V >= 1"),
        ({"weight": torch.zeros(V, H).as_subclass(Split)}, "weight is a Split, expected a plain"),
        ({"weight": torch.zeros(V, H, device="meta")}, "weight is on meta, expected cpu like hid"),
        ({"hidden": torch.zeros(T, 4)}, r"hidden has shape \(5, 4\), expected \(T, 3\) to match"),
        ({"hidden": torch.zeros(6, H)}, "got 6 rows, expected the plan's 5 tokens"),
        (
            {"hidden": torch.zeros(T, H).half()},
            "hidden is torch.float16 and weight is torch.float32, expected both of one dtype",
        ),
        (
            {"hidden": torch.zeros(T, H).int(), "weight": torch.zeros(V, H).int()},
            "hidden is torch.int32 and weight is torch.int32, expected both of one dtype",
        ),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\), expected \(7,\)"),
        ({"bias": torch.zeros(V, device="meta")}, "bias is on meta, expected cpu like hidden"),
    ],
)
def test_fused_linear_grpo_says_what_it_got_and_expected(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_grpo(**(arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SHARED,
        ({"logits": torch.zeros(T)}, r"logits is torch.float32 \(5,\), expected \(T, V\) of float"),
        ({"logits": torch.zeros(T, 0)}, r"logits is torch.float32 \(5, 0\), expected \(T, V\)"),
        ({"logits": torch.zeros(T, V).int()}, r"logits is torch.int32 \(5, 7\), expected \(T, V\)"),
        ({"logits": torch.zeros(6, V)}, "got 6 rows, expected the plan's 5 tokens"),
    ],
)
def test_logits_grpo_says_what_it_got_and_expected(change, message):
    given = {"logits": torch.zeros(T, V), **arguments()} | change
    del given["hidden"], given["weight"]
    with pytest.raises(ValueError, match=message):
        logits_grpo(**given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 0.0}, "clip_low is 0.0, expected > 0"),
        ({"clip_high": -0.1}, "clip_high is -0.1, expected > 0"),
        ({"clip_high": math.nan}, "clip_high is nan, expected > 0"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp is 0.0, expected > 0"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0, expected > 1 or None"),
        ({"delta": 1.2}, r"delta is 1.2, expected > 1 \+ clip_high = 1.28 or None"),
        ({"sapo_temperatures": (1.0, 0.0)}, r"sapo_temperatures is 0.0, expected > 0"),
        ({"nll_alpha": -1.0}, "nll_alpha is -1.0, expected a finite number >= 0"),
        ({"nll_alpha": math.inf}, "nll_alpha is inf, expected a finite number >= 0"),
        ({"entropy_coef": math.nan}, "entropy_coef is nan, expected a finite number"),
        ({"temperature": 0.0}, "temperature is 0.0, expected > 0"),
        ({"temperature": math.inf}, "temperature is inf, expected a finite number"),
        ({"softcap": 0.0}, "softcap is 0.0, expected > 0"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0, expected a finite number, not 0"),
    ],
)
def test_loss_spec_says_what_it_got_and_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        LossSpec(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "k4"}, "kind is 'k4', expected 'k1', 'k2' or 'k3'"),
        ({"beta": -0.1}, "beta is -0.1, expected a finite number >= 0"),
        ({"beta": math.inf}, "beta is inf, expected a finite number >= 0"),
        ({"clamp_input": 0.0}, "clamp_input is 0.0, expected > 0"),
        ({"clamp_output": math.nan}, "clamp_output is nan, expected > 0"),
    ],
)
def test_kl_says_what_it_got_and_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        KL(**settings)
