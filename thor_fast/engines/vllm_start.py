"""Bringing vLLM up: the import that may fail, and an ``AsyncLLM`` that fits a shared machine."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

from thor_fast.errors import EngineError

__all__ = ["import_vllm", "saved_dtype", "splicing", "start"]

# The connector's hooks are vLLM's own affair and move between minor versions: 0.32 was run, 0.33
# compared with it in source.
_SPLICING = ("0.32", "0.33")


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


def splicing(args: dict[str, Any]) -> Any:
    """The ``KVTransferConfig`` that loads our connector; ``EngineError`` where it cannot work."""
    version = str(import_vllm("vllm").__version__)
    if ".".join(version.split(".")[:2]) not in _SPLICING:
        raise EngineError(
            f"vLLM is {version}, expected {' or '.join(_SPLICING)} for splice_kv (without it any "
            "from 0.32 on)"
        )
    if args.get("data_parallel_size", 1) != 1:
        raise EngineError(
            f"data_parallel_size is {args['data_parallel_size']}, expected 1 for splice_kv: KV is "
            "held in the rank that computed it"
        )
    if args.get("speculative_config") is not None:
        raise EngineError("speculative_config is set, expected None for splice_kv")
    return import_vllm("vllm.config").KVTransferConfig(
        kv_connector="SplicingKVConnector",
        kv_connector_module_path="thor_fast.engines.vllm_connector",
        kv_role="kv_both",
    )


def start(args: dict[str, Any]) -> Any:
    """An ``AsyncLLM`` with these ``AsyncEngineArgs``; ``EngineError`` where vLLM does not start.

    On a CPU its KV pool has room for ``max_num_seqs`` sequences of ``max_model_len`` tokens, unless
    its size is given.
    """
    import_vllm("vllm")
    on_cpu = import_vllm("vllm.platforms").current_platform.is_cpu()
    if on_cpu:
        # A seeded request whose prefill is cut in two makes vLLM 0.32 wind back its generator,
        # which a CPU generator cannot do: the engine core dies. So none is cut.
        args = {"max_num_batched_tokens": max(2048, args["max_model_len"]), **args}
        args["enable_chunked_prefill"] = False
    try:
        config = import_vllm("vllm.engine.arg_utils").AsyncEngineArgs(**args).create_engine_config()
        cache = config.cache_config
        # vLLM would take 92 % of the machine's memory, and fail if somebody else has any of it.
        if on_cpu and cache.kv_cache_memory_bytes is None:
            cache.kv_cache_memory_bytes = _pool_bytes(config)
        async_llm = import_vllm("vllm.v1.engine.async_llm").AsyncLLM
        return async_llm.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"vLLM does not start on {args['model']!r}: {reason}") from error


def _pool_bytes(config: Any) -> int:
    """KV of as many full contexts as there are sequences, and of vLLM's placeholder block.

    With the connector one block more for each: a copy of its last one.
    """
    model, block_size = config.model_config, config.cache_config.block_size
    heads = model.get_num_kv_heads(config.parallel_config)
    layers = model.get_num_layers(config.parallel_config)
    token_bytes = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
    per_sequence = math.ceil(model.max_model_len / block_size)
    per_sequence += config.kv_transfer_config is not None
    n_blocks = config.scheduler_config.max_num_seqs * per_sequence + 1
    return int(n_blocks * block_size * token_bytes)
