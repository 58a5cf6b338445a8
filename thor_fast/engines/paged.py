"""The embedded engine: continuous batching over a Hugging Face causal LM, on CPU or one GPU.

KV lives in blocks of a pool that is allocated once, ``layers * 2 * kv_tokens * kv_heads *
head_width`` elements. ``blocks.py`` counts who holds which block, ``sessions.py`` decides who gets
one, ``paged_attention.py`` reads and writes them, ``step_loop.py`` runs the steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from thor_fast.engines.base import (
    Capabilities,
    GenerateRequest,
    KVBudget,
    TokenChunk,
    check_context,
    check_model_folder,
)
from thor_fast.engines.blocks import BlockPool
from thor_fast.engines.decode_graph import decode_graphs
from thor_fast.engines.model_twin import probe, shadow
from thor_fast.engines.paged_attention import KVPool
from thor_fast.engines.sessions import SessionTable
from thor_fast.engines.step_loop import EngineCounters, StepLoop
from thor_fast.engines.token_stream import TokenStream
from thor_fast.errors import EngineError

__all__ = ["EngineCounters", "PagedEngine"]

_T = TypeVar("_T")


class PagedEngine:
    """``Engine`` over a model in this process; see :mod:`thor_fast.engines.base` for the contract.

    Every step advances each live sequence by one token, and prefills new and resumed ones next to
    them. All model work happens on one thread of the engine's own, ``GenerateRequest.watch``
    included. Tokens arrive in chunks of up to 16.

    - **Blocks.** A session holds the blocks of its tokens until ``release``; equal beginnings are
      held once. A call is admitted when there are blocks for its context and one token more,
      sessions that hold KV first, then first come, first served, at most ``max_sequences`` at a
      time. A session that is idle loses its KV, the longest unused first, when a running or resumed
      one needs blocks, or when nothing could run otherwise; it is prefilled again when it returns.
      Where that is not enough, the youngest call is interrupted and prefilled again later: what it
      has streamed stays.
    - **Fork** and **truncate** change block tables. At most one block is copied, by whoever writes
      to a shared one.
    - **Greedy** calls (temperature 0) report log-probs at temperature 1.
    - **Weights.** Change them only while no call is in flight, then ``await update_weights``: a
      float32 model on a CPU is copied, with weights laid out anew, and the copy made again there. A
      call in flight across it goes on under the new weights, from a prefill of all it has.

    ``model``: plain causal attention in every layer, through transformers' attention interface
    (Qwen2, Qwen3, Llama and their kin). It is not modified, and may be trained or evaluated on
    other threads; ``device`` moves it there first. ``kv_tokens``: positions in the pool, rounded
    down to blocks of ``block_size``; by default enough for ``max_sequences`` of ``max_context``.
    Raises ``EngineError`` for a model or sizes that cannot work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        max_context: int,
        kv_tokens: int | None = None,
        block_size: int = 16,
        device: str | torch.device | None = None,
    ) -> None:
        limit = getattr(model.config, "max_position_embeddings", max_context)
        blocks = _check_sizes(max_sequences, max_context, limit, kv_tokens, block_size)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]
        heads = probe(shadow(model))
        pool = KVPool(blocks, block_size, model.config.num_hidden_layers, heads.keys)
        widest = -(-max_context // block_size)
        embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
        self._vocab = embeddings.num_embeddings
        self._max_sequences, self._max_context = max_sequences, max_context
        self._max_tokens, self._block_size = blocks * block_size, block_size
        self._weight_version = 0
        self._steps = StepLoop(
            model,
            pool,
            SessionTable(BlockPool(blocks), block_size),
            decode_graphs(pool, heads, max_rows=max_sequences, max_blocks=widest),
            max_sequences=max_sequences,
            max_context=max_context,
        )
        # At interpreter exit, too: a thread killed inside a torch kernel aborts the process.
        weakref.finalize(self, _stop, self._steps)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        max_sequences: int,
        max_context: int,
        kv_tokens: int | None = None,
        block_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> PagedEngine:
        """Load a model from a local folder; ``dtype`` None takes the one it was saved in.

        Raises ``EngineError`` where there is no model at ``path``.
        """
        check_model_folder(path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto" if dtype is None else dtype, local_files_only=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise EngineError(f"cannot load the model at {str(path)!r}: {reason}") from error
        return cls(
            model,
            max_sequences=max_sequences,
            max_context=max_context,
            kv_tokens=kv_tokens,
            block_size=block_size,
            device=device,
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            max_context=self._max_context,
            watch=True,
            native_fork=True,
            native_truncate=True,
            prefix_cache=True,
        )

    @property
    def kv_budget(self) -> KVBudget:
        """``live_tokens`` counts whole blocks, each of them once, whoever shares it."""
        sequences, tokens = self._steps.table.live
        return KVBudget(
            # Paused sequences are bounded by their blocks only.
            max_sequences=self._max_tokens // self._block_size,
            max_tokens=self._max_tokens,
            live_sequences=sequences,
            live_tokens=tokens,
            block_tokens=self._block_size,
        )

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def counters(self) -> EngineCounters:
        """Totals so far."""
        table = self._steps.table
        return replace(
            self._steps.counters, prefix_tokens=table.prefix_tokens, evictions=table.evictions
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Stream tokens; see :meth:`Engine.generate`.

        Raises ``EngineError`` for a context too long to start, a token id outside the vocabulary,
        a session that is generating already, logits that are not finite, a closed engine.
        """
        check_context(request.token_ids, self._max_context, self._vocab)
        stream = TokenStream(asyncio.get_running_loop())
        self._steps.post(lambda: self._steps.start(request, stream))
        try:
            while not stream.drained:
                yield await stream.get()
        finally:
            if not stream.ended:
                # A closed engine has stopped the call by itself.
                with contextlib.suppress(EngineError):
                    self._steps.post(lambda: self._steps.cancel(stream))

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        return await self._ask(lambda: self._steps.table.fork(session, n, at_token))

    async def truncate(self, session: str, at_token: int) -> None:
        await self._ask(lambda: self._steps.table.truncate(session, at_token))

    async def release(self, session: str) -> None:
        """Forget a session; a call in flight on it raises ``EngineError``."""
        # Called in ``finally`` blocks: a closed engine has nothing to forget, and an error here
        # would hide the one that is on its way, or swallow a cancellation.
        with contextlib.suppress(EngineError):
            await self._ask(lambda: self._steps.release(session))

    async def update_weights(self, version: int) -> None:
        """See :meth:`Engine.update_weights`. ``EngineError`` unless ``version`` has grown."""
        if version <= self._weight_version:
            raise EngineError(
                f"weight version is {version}, expected more than {self._weight_version}, "
                "the present one"
            )
        await self._ask(lambda: self._steps.invalidate(version))
        self._weight_version = version

    async def aclose(self) -> None:
        await asyncio.to_thread(_stop, self._steps)

    async def _ask(self, command: Callable[[], _T]) -> _T:
        """Run ``command`` on the engine's thread and hand back what it returns or raises."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def settle(result: _T | None, error: Exception | None) -> None:
            if answer.done():  # the asker was cancelled
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = command()
            except Exception as error:  # noqa: BLE001 - belongs to the asker, not to the engine
                failure = error
            # RuntimeError: the asker's loop is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, failure)

        self._steps.post(run)
        return await answer


def _check_sizes(
    max_sequences: int, max_context: int, limit: int, kv_tokens: int | None, block_size: int
) -> int:
    """How many blocks the pool has."""
    for name, value in (("max_sequences", max_sequences), ("block_size", block_size)):
        if value < 1:
            raise EngineError(f"{name} is {value}, expected at least 1")
    if not 2 <= max_context <= limit:
        raise EngineError(
            f"max_context is {max_context}, expected 2 to {limit}, the model's positions"
        )
    one = -(-max_context // block_size)
    blocks = max_sequences * one if kv_tokens is None else kv_tokens // block_size
    if blocks < one:
        raise EngineError(
            f"kv_tokens is {kv_tokens}, expected at least {one * block_size}: one sequence of "
            f"max_context {max_context} in blocks of {block_size}"
        )
    return blocks


def _stop(steps: StepLoop) -> None:
    steps.stop("the engine is closed")
    steps.join()
