"""A KV connector for vLLM whose store is the KV cache itself: pin, resume, fork, roll back.

vLLM's prefix cache forgets the last, partly filled block of a request, and everything else as soon
as other requests want the room. This connector keeps a finished request's blocks (a *pin*, see
:mod:`thor_fast.engines.vllm_pins`) and gives them to any later request that starts with the same
tokens under the same weights, up to any token: full blocks are shared through the prefix cache, of
the last one the new request gets a copy, made before its forward. Resuming, forking and rolling
back are the same thing: a request that names a pin, and shares some of its tokens.

Loaded by vLLM through ``kv_connector_module_path`` (no patch); imported in vLLM's processes only.
A request asks for it in ``SamplingParams.extra_args["kv_transfer_params"]["thor_fast"]``:
``{"pin": str, "source": str | None, "last": bool, "drop": list[str]}``: the name to keep its KV
under once it has stopped by itself (an aborted one is not kept), the pin to start from, whether
nobody else is likely to start there, and pins to give back.

What keeps the prefix cache clean: tokens and salt of source and request are compared here, so what
is copied is the KV of the very tokens vLLM files it under; and the copy is the new request's own,
without a hash until that request has filled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # type: ignore[import-not-found]
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy  # type: ignore[import-not-found]
from vllm.v1.kv_cache_interface import FullAttentionSpec  # type: ignore[import-not-found]
from vllm.v1.request import RequestStatus  # type: ignore[import-not-found]
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace  # type: ignore[import-not-found]

from thor_fast.engines.tail_copies import TailCopy
from thor_fast.engines.vllm_copies import copier
from thor_fast.engines.vllm_pins import Pin, PinTable

__all__ = ["SplicingKVConnector"]

# Aborted requests are not kept: whoever ends one from outside does not say that it comes back.
_KEPT = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class _Copies(KVConnectorMetadata):  # type: ignore[misc]
    """What to copy before the next forward."""

    copies: list[TailCopy]


class SplicingKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM makes one in the scheduler and one in each worker; see the module.

    Raises ``ValueError`` for models whose KV is not one group of full attention (sliding windows,
    Mamba): a block of theirs may be gone or mean something else.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        kinds = [type(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
        if kinds != [FullAttentionSpec]:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"KV cache groups are {names}, expected one FullAttentionSpec")
        self._spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._block_size: int = self._spec.block_size
        self._copies: list[TailCopy] = []
        self._in_use: set[str] = set()
        self._spent: list[str] = []

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a pin that is not made costs a prefill, so vLLM need not recompute for it."""
        return False

    # In the scheduler.

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool
        self._pins = PinTable(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        self._pins.drop(_asked(request).get("drop", ()))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens of ``request`` that a pin holds beyond those the prefix cache has.

        vLLM asks for the request at the head of its queue whenever it has a sequence free. If
        blocks are short, pins make room here: nothing else would free them.
        """
        source: str | None = _asked(request).get("source")
        shared = self._shared(request)
        held = min(num_computed_tokens, shared) // self._block_size
        needed = -(-request.num_tokens // self._block_size) - held
        needed += self._kv_cache_manager.watermark_blocks
        keep = {*self._in_use, source or ""}
        self._pins.make_room(needed, keep=keep, only_spent=True)
        short = self._pool.get_num_free_blocks() < needed
        if source and short and _asked(request)["last"] and source not in self._in_use:
            # Its last, partly filled block is computed again: less than any other pin's loss. The
            # full ones are in the prefix cache, where this request has found them.
            self._pins.drop([source])
        self._pins.make_room(needed, keep=keep)
        self._pins.make_room(needed, keep=self._in_use)
        if short:
            shared = self._shared(request)
        return max(shared - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        name = _asked(request).get("source")
        if name is not None and _asked(request)["last"]:
            self._spent.append(name)
        if num_external_tokens == 0:
            return
        assert name is not None
        pin, shared = self._pins.use(name), self._shared(request)
        assert pin is not None
        # Until the copy is made its blocks must not become somebody else's.
        self._in_use.add(name)
        (targets,) = blocks.get_block_ids()
        first = (shared - num_external_tokens) // self._block_size
        for i in range(first, -(-shared // self._block_size)):
            n_tokens = min(shared - i * self._block_size, self._block_size)
            self._copies.append(TailCopy(pin.blocks[i].block_id, targets[i], n_tokens))

    def build_connector_meta(self, scheduler_output: Any) -> _Copies:
        # Workers run the steps in order: from the next one on, these sources may be written.
        self._in_use.clear()
        for name in self._spent:
            self._pins.spend(name)
        self._spent.clear()
        copies, self._copies = self._copies, []
        return _Copies(copies)

    def has_pending_block_frees(self) -> bool:
        """Asked before a running request is preempted; it is not if pins can make room instead."""
        return self._pins.make_room(self._pool.get_num_free_blocks() + 1)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        name = _asked(request).get("pin")
        if name is not None and request.status in _KEPT:
            # Not the last sampled token: its KV would come with the next step.
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            n_tokens = min(computed, request.num_tokens - 1)
            n_blocks = -(-n_tokens // self._block_size)
            blocks = tuple(self._pool.blocks[i] for i in block_ids[0][:n_blocks])
            tokens = tuple(request.all_token_ids[:n_tokens])
            self._pins.add(name, Pin(tokens, blocks, request.cache_salt))
        return False, None

    def reset_cache(self) -> bool:
        """Drop all pins: ``reset_prefix_cache(reset_connector=True)``, before new weights."""
        self._pins.clear()
        return True

    def _shared(self, request: Any) -> int:
        source = _asked(request).get("source")
        pin = self._pins.use(source) if source is not None else None
        return pin.shared(request.all_token_ids, request.cache_salt) if pin is not None else 0

    # In each worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Choose how tokens are copied: on a GPU by a plan, where the caches' form is known.

        Elsewhere whole blocks are, which is right in any layout. What a block holds behind the
        shared tokens is written over, or masked by the length.
        """
        caches, num_blocks = list(kv_caches.values()), self._kv_cache_config.num_blocks
        self._copy = copier(caches, num_blocks, self._spec.head_size) or partial(
            _copy_blocks, caches, num_blocks
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy on the stream of the forward that comes next."""
        copies = self._get_connector_metadata().copies
        if copies:
            self._copy(copies)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Nothing to save: the store is the cache."""

    def wait_for_save(self) -> None:
        """See :meth:`save_kv_layer`."""


def _copy_blocks(
    caches: Sequence[torch.Tensor], num_blocks: int, copies: Sequence[TailCopy]
) -> None:
    pairs = [KVCacheBlockCopy(copy.source, copy.target) for copy in copies]
    copy_kv_cache_blocks_inplace(caches, num_blocks, pairs)


def _asked(request: Any) -> dict[str, Any]:
    """What a request asks of this connector; empty for one that does not."""
    asked: dict[str, Any] = (request.kv_transfer_params or {}).get("thor_fast", {})
    return asked
