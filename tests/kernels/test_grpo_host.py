"""The host neither waits for the device nor sends it anything, so that a CUDA graph holds a call.

Run on torch's ``meta`` device, which has shapes and no numbers: asking one of its tensors for a
number is an error, as is an operation on it and a tensor of the CPU; and a copy from there shows.
What only CUDA can tell is in test_grpo_gpu.py.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thor_fast.kernels import (
    KL,
    LossSpec,
    fused_linear_grpo,
    hierarchical_grpo,
    hierarchical_grpo_logits,
    logits_grpo,
    selected_logprob,
)

SPECS = {
    "thor": LossSpec(),
    "everything": LossSpec(kl=KL(beta=0.1), entropy_coef=0.1, softcap=9.0, logit_scale=0.5),
    "cispo": LossSpec(kind="cispo", entropy=True),
    "sapo": LossSpec(kind="sapo"),
    "gspo": LossSpec(kind="gspo"),
}
META = torch.device("meta")


class Recorder(TorchDispatchMode):
    """The names of the operations that copied a tensor of the CPU to elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 0]
        if isinstance(out, torch.Tensor) and out.is_meta and any(a.is_cpu for a in given):
            self.copies.append(str(func))
        return out


def on_meta(batch: Any) -> dict[str, torch.Tensor]:
    names = ("hidden", "weight", "bias", "targets", "old_logp", "ref_logp", "temperature")
    return {
        name: values.to(META, torch.float32 if values.is_floating_point() else None)
        for name in names
        for values in [getattr(batch, name).detach()]
    }


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run as the functions that they are: on ``meta`` torch would run their fakes."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    # The package's name for the function hides the module's.
    logprob = sys.modules[selected_logprob.__module__]
    for module, name in (
        (hierarchical_grpo, "_fused_linear_grpo_op"),
        (hierarchical_grpo_logits, "_logits_grpo_op"),
        (logprob, "_selected_logprob_op"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)


def call(name: str, held: dict[str, torch.Tensor], plan: Any, spec: LossSpec) -> None:
    more = {"temperature": held["temperature"]}
    # What the head gets back is made in the forward, if somebody wants it.
    states, head = (held[leaf].detach().requires_grad_() for leaf in ("hidden", "weight"))
    rows = (held["targets"], plan, held["old_logp"], held["ref_logp"])
    if name == "logprob":
        selected_logprob(states, head, held["targets"], plan, **more)
    elif name == "head":
        fused_linear_grpo(
            *(states, head, *rows), spec=spec, bias=held["bias"], chunk_rows=5, **more
        )
    else:
        logits = states @ head.t()
        logits_grpo(logits, *rows, spec=spec, **more)
        parts = 7 if spec.entropy_coef else 5
        chosen = plan.on(META, plan.select(spec)).rows
        gradient = hierarchical_grpo_logits._gradient_op._init_fn(
            logits.detach(),
            chosen,
            torch.empty_like(chosen),
            torch.empty(parts, len(chosen), device=META),
            torch.empty((), device=META),
            spec.text,
            False,
        )
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("op", ["head", "logits", "logprob"])
@pytest.mark.usefixtures("opened")
def test_a_plan_is_sent_once_and_nothing_else_ever(make_grpo_batch, op, name):
    batch = make_grpo_batch(seed=71)
    plan, held = batch.plan(), on_meta(batch)
    copied = []
    for _ in range(2):
        with Recorder() as recorder:
            call(op, held, plan, SPECS[name])
        copied.append(len(recorder.copies))
    assert copied == [8, 0]  # the parts of a selection


def test_a_plan_keeps_one_copy_of_each_selection(make_grpo_batch):
    plan = make_grpo_batch(seed=71).plan()
    some, all_rows = plan.select(LossSpec()), plan.trainable
    assert plan.on(META, some) is plan.on(META, some)
    assert plan.on(META, some) is not plan.on(META, all_rows)
    assert plan.on(META, all_rows).rows.shape == all_rows.rows.shape
    assert plan.on(torch.device("cpu"), some) is some
