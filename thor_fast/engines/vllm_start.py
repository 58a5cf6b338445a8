"""Bringing vLLM up: the import that may fail, and an ``AsyncLLM`` that fits a shared machine."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

from thor_fast.errors import EngineError

__all__ = ["import_vllm", "saved_dtype", "start"]


def import_vllm(name: str) -> Any:
    """A module of vLLM's; ``EngineError`` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(
            f"cannot import {name} ({error}), expected pip install 'thor_fast[vllm]'"
        ) from error


def saved_dtype(path: Path) -> str:
    """The name of a saved model's dtype. vLLM's own "auto" would make bfloat16 of float32."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise EngineError(f"cannot read {str(path / 'config.json')!r}: {error}") from error
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def start(args: dict[str, Any], max_sequences: int) -> Any:
    """An ``AsyncLLM``; on a CPU, with a KV pool for ``max_sequences`` full contexts."""
    arg_utils = import_vllm("vllm.engine.arg_utils")
    async_llm = import_vllm("vllm.v1.engine.async_llm")
    config = arg_utils.AsyncEngineArgs(**args).create_engine_config()
    cache, model = config.cache_config, config.model_config
    on_cpu = import_vllm("vllm.platforms").current_platform.is_cpu()
    # vLLM would take 92 % of the machine's memory, and fail if somebody else has any of it.
    if on_cpu and cache.kv_cache_memory_bytes is None:
        heads = model.get_num_kv_heads(config.parallel_config)
        layers = model.get_num_layers(config.parallel_config)
        token_bytes = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
        blocks = max_sequences * math.ceil(model.max_model_len / cache.block_size) + 1
        cache.kv_cache_memory_bytes = blocks * cache.block_size * token_bytes
    return async_llm.AsyncLLM.from_vllm_config(config, disable_log_stats=True)
