"""LoRA through peft: packed forward, frozen head, gradients of the adapters alone."""

from __future__ import annotations

import pytest
import torch

from thor_fast.kernels import LossSpec
from thor_fast.rl import HierarchicalGRPOLoss, hidden_states, pack

from .training_problem import make_model, make_sequences

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

# No clipping: a ratio at a bound would make rounding errors visible.
LOSS = HierarchicalGRPOLoss(LossSpec(clip_low=1.0, clip_high=1e9, dual_clip=None))


def with_lora(*, random: bool, targets: list[str] | str = "all-linear"):
    model = make_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=not random)
    return peft.get_peft_model(model, config)


def gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        LOSS(hidden_states(model, batch), model.get_output_embeddings(), batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_an_adapter_that_does_nothing_changes_nothing():
    (batch,) = pack(make_sequences(), max_tokens=1000)
    with torch.no_grad():
        found = hidden_states(with_lora(random=False), batch)
        assert torch.equal(found, hidden_states(make_model(), batch))
        assert not torch.equal(hidden_states(with_lora(random=True), batch), found)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_only_adapters_have_gradients_and_those_of_single_sequences(checkpointed):
    model = with_lora(random=True).train()
    expected = gradients(model, pack(make_sequences(), max_tokens=1))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 7  # matrices, layers, linear modules of a layer
    assert set(expected) == set(trainable)
    if checkpointed:
        model.activation_checkpointing_enable()
    found = gradients(model, pack(make_sequences(), max_tokens=60, share_prefixes=True))
    assert set(found) == set(trainable)
    for name, truth in expected.items():
        assert truth.any()
        assert float((found[name] - truth).norm() / truth.norm()) < 1e-5, name


def test_an_adapter_on_the_head_is_refused():
    """The loss reads the head's matrix; what a module adds to it would be lost without a word."""
    model = with_lora(random=True, targets=["q_proj", "lm_head"])
    (batch,) = pack(make_sequences(), max_tokens=1000)
    with pytest.raises(TypeError, match=r"lm_head is peft\.tuners\.\S+Linear, expected"):
        gradients(model, [batch])
