"""Which other models work, which are refused and why, and that a GPU gives the same."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from thor_fast.engines.paged import PagedEngine
from thor_fast.errors import EngineError

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WORK = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, **EXPERTS}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 48, "n_layer": 2, "n_head": 6}),
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "v_head_dim": 8}
REFUSED = {
    "asks for sliding_window=4096, expected plain causal": (Gemma2ForCausalLM, Gemma2Config, {}),
    r"keys \(1, 6, 1, 16\) and values \(1, 6, 1, 8\), expected the same shape": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {**LATENT, **EXPERTS},
    ),
    "sent 0 of 2 layers through transformers' attention interface": (
        BloomForCausalLM,
        BloomConfig,
        {"n_layer": 2, "n_head": 6},
    ),
}


def build(model: Any, config: Any, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(config(**SIZES, **settings)).eval()


async def check(driver: Any, tolerance: float) -> None:
    """Ragged prompts, a fork at an unaligned position, a resumed call."""
    prompts = {"a": [(7 * i) % 61 for i in range(37)], "b": [5, 6, 7]}
    results = await asyncio.gather(
        *[driver.generate(ids, 9, session=name, seed=2) for name, ids in prompts.items()]
    )
    known = {n: prompts[n] + tokens for n, (tokens, _, _) in zip(prompts, results, strict=True)}
    (child,) = await driver.engine.fork("a", 1, 41)
    known[child] = known["a"][:41]
    again = await asyncio.gather(
        *[driver.generate([*ids, 1, 2], 6, session=name) for name, ids in known.items()]
    )
    for (_, logprobs, _), ids in zip(results, known.values(), strict=False):
        np.testing.assert_allclose(logprobs, driver.truth(ids, 9), atol=tolerance)
    for (tokens, logprobs, _), ids in zip(again, known.values(), strict=True):
        truth = driver.truth([*ids, 1, 2, *tokens], 6)
        np.testing.assert_allclose(logprobs, truth, atol=tolerance)
    assert sorted(driver.prefill) == [2, 3, 3, 3, 37]
    await driver.engine.aclose()


@pytest.mark.parametrize("name", WORK)
async def test_models_with_plain_attention_work(driver_class: Any, name: str) -> None:
    model = build(*WORK[name])
    await check(driver_class(PagedEngine(model, max_sequences=3, max_context=96), model), 5e-5)


@pytest.mark.parametrize("reason", REFUSED)
def test_models_with_other_attention_are_refused(reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        PagedEngine(build(*REFUSED[reason]), max_sequences=1, max_context=64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
async def test_on_a_gpu(models: dict[str, Any], driver_class: Any, family: str) -> None:
    model = models[family]
    engine = PagedEngine(copy.deepcopy(model), max_sequences=3, max_context=96, device="cuda")
    await check(driver_class(engine, model), 1e-3)
