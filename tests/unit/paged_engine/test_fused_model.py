"""Which models are run in fused form, and that a fused one is the model as it was then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from thor_fast.engines.fused_model import fuse
from thor_fast.engines.model_twin import shadow

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Adapter(nn.Linear):
    """Not a plain linear layer, whatever it computes."""


def to_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def hook_a_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: None)


def hook_an_input(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)


def adapt(model: Any) -> None:
    old = model.model.layers[1].self_attn.v_proj
    model.model.layers[1].self_attn.v_proj = Adapter(old.in_features, old.out_features, bias=False)


def add_a_part(model: Any) -> None:
    model.model.layers[0].mlp.extra = nn.Identity()


def ruin(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(
    "change", [to_bfloat16, hook_a_norm, hook_an_input, adapt, add_a_part, ruin]
)
def test_what_is_not_the_plain_model_is_left_to_its_modules(
    models: Any, family: str, change: Callable[[Any], None]
) -> None:
    twin = shadow(models[family])
    assert fuse(twin) is not None
    model = type(models[family])(models[family].config)
    change(model)
    assert fuse(shadow(model)) is None


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": None}),
        # The same parts under the same names, another formula: only the logits tell.
        (GraniteForCausalLM, GraniteConfig, {"residual_multiplier": 0.5}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 1.01}),
    ],
)
def test_other_formulas_are_found_out(model: Any, config: Any, settings: dict[str, Any]) -> None:
    assert fuse(shadow(model(config(**SIZES, **settings)))) is None


def test_biases_of_all_products_are_kept(models: Any) -> None:
    config = type(models["llama"].config)(**SIZES, attention_bias=True, mlp_bias=True)
    model = type(models["llama"])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    assert fuse(shadow(model)) is not None


async def test_changes_of_weights_are_seen_with_the_next_version(make: Any) -> None:
    driver = make("qwen3", initializer_range=0.28)
    before = await driver.generate([3, 1, 4], 6, temperature=0.0)
    with torch.no_grad():
        driver.model.lm_head.weight.neg_()
    assert await driver.generate([3, 1, 4], 6, session="t", temperature=0.0) == before
    await driver.engine.update_weights(1)
    tokens, logprobs, _ = await driver.generate([3, 1, 4], 6, session="u", temperature=0.0)
    assert tokens != before[0]
    assert logprobs == pytest.approx(driver.truth([3, 1, 4, *tokens], 6), abs=5e-5)
