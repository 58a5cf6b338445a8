"""Tiny random models, and an engine that is always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thor_fast.engines.base import FinishReason, GenerateRequest, SamplingParams
from thor_fast.engines.paged import PagedEngine

VOCAB = 61
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def build_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model with grouped heads: 6 query heads on 2 key heads of 8 numbers, 3 layers."""
    config_class, model_class = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        # Wide enough to make the distribution peaked: greedy decoding then has no near-ties.
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **overrides,
    }
    torch.manual_seed(0)
    return model_class(config_class(**settings)).eval()


class Driver:
    """An engine plus what a test wants to say in one line."""

    def __init__(self, engine: PagedEngine, model: PreTrainedModel) -> None:
        self.engine = engine
        self.model = model
        self.prefill: list[int] = []

    async def generate(
        self,
        ids: list[int],
        max_tokens: int = 8,
        *,
        session: str = "s",
        stop: frozenset[int] = frozenset(),
        watch: Callable[[int], bool] | None = None,
        **sampling: Any,
    ) -> tuple[list[int], list[float], FinishReason]:
        """All tokens and log-probs of one call; notes how many tokens it prefilled."""
        request = GenerateRequest(
            tuple(ids), session, max_tokens, stop, SamplingParams(**sampling), watch
        )
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = None
        async for chunk in self.engine.generate(request):
            assert finish is None
            if not tokens:
                assert chunk.prefill_tokens is not None
                self.prefill.append(chunk.prefill_tokens)
            else:
                assert chunk.prefill_tokens is None
            assert len(chunk.token_ids) == len(chunk.logprobs) > 0
            tokens += chunk.token_ids
            logprobs += chunk.logprobs
            finish = chunk.finish
        assert finish is not None
        return tokens, logprobs, finish

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the engine run until ``condition`` holds."""
        while not condition():  # noqa: ASYNC110 - what is awaited happens on another thread
            await asyncio.sleep(0)

    def truth(self, ids: list[int], n: int, temperature: float = 1.0) -> list[float]:
        """Log-probs of the last ``n`` tokens by one plain forward of the untouched model."""
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
        first = len(ids) - n
        return [float(logprobs[p - 1, ids[p]]) for p in range(first, len(ids))]


@pytest.fixture(scope="session")
def models() -> dict[str, PreTrainedModel]:
    return {family: build_model(family) for family in FAMILIES}


@pytest_asyncio.fixture
async def make(
    models: dict[str, PreTrainedModel],
) -> AsyncIterator[Callable[..., Driver]]:
    """``make("qwen3", max_sequences=4, max_context=128)``: a driver.

    Further keywords are settings of a model of its own.
    """
    made: list[PagedEngine] = []

    def build(
        family: str = "qwen3",
        max_sequences: int = 4,
        max_context: int = 128,
        kv_tokens: int | None = None,
        block_size: int = 16,
        **overrides: Any,
    ) -> Driver:
        model = build_model(family, **overrides) if overrides else models[family]
        engine = PagedEngine(
            model,
            max_sequences=max_sequences,
            max_context=max_context,
            kv_tokens=kv_tokens,
            block_size=block_size,
        )
        made.append(engine)
        return Driver(engine, model)

    yield build
    for engine in made:
        await engine.aclose()


@pytest.fixture(scope="session")
def driver_class() -> type[Driver]:
    return Driver
