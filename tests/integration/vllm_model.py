"""A tiny model made on the spot, what transformers says it says, and one call of an engine."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from thor_fast.engines.base import GenerateRequest, SamplingParams

WITH_VLLM = importlib.util.find_spec("vllm") is not None


def needs_vllm(test):
    skip = pytest.mark.skipif(not WITH_VLLM, reason="needs vllm: pip install 'thor_fast[vllm]'")
    return pytest.mark.slow(skip(test))


VOCAB = 512
BLOCK = 32
MAX_CONTEXT = 256
# Log-probs of vLLM's float32 kernels against one plain forward of the same weights by transformers.
# Other summation orders; measured: 1.4e-5 at most.
LOGPROB_TOLERANCE = 5e-5


def build_model(seed: int = 0) -> Qwen3ForCausalLM:
    """Random; untied and wide, so that greedy decoding neither repeats itself nor has near-ties."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def prompt(n: int, start: int = 1) -> list[int]:
    return [4 + (start * 97 + 31 * i) % (VOCAB - 4) for i in range(n)]


PROMPT = prompt(20)


def greedy(model: Qwen3ForCausalLM, ids: list[int], n: int) -> list[int]:
    inputs = torch.tensor([ids])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(ids) :].tolist()


def truth(model, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """[T] float64: log-prob of each token given those before it; 0.0 for the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
    chosen = logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
    return np.concatenate(([0.0], chosen.numpy()))


async def generate(engine, ids, max_tokens=8, *, session="s", stop=(), **sampling):
    """Tokens, log-probs, the reason and the prefill count of one call."""
    request = GenerateRequest(
        tuple(ids), session, max_tokens, frozenset(stop), SamplingParams(**sampling)
    )
    chunks = [chunk async for chunk in engine.generate(request)]
    assert all(chunk.finish is None for chunk in chunks[:-1])
    assert all(chunk.prefill_tokens is None for chunk in chunks[1:])
    tokens = [t for chunk in chunks for t in chunk.token_ids]
    logprobs = [p for chunk in chunks for p in chunk.logprobs]
    assert len(tokens) == len(logprobs) > 0
    return tokens, logprobs, chunks[-1].finish, chunks[0].prefill_tokens
