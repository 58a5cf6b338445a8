"""Token-in, token-out over an engine that forgets: what verl's agent loop does with its server.

Every call is a request of its own, under a new name, with all tokens so far. When it ends its KV
goes back to the engine, which may still find it in its prefix cache when the next call comes, block
by block, if nobody has needed the room meanwhile. Nobody is kept from starting: the budget this
engine states is without end, so a scheduler on it admits everything, and the real engine queues.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from thor_fast.engines.base import Capabilities, Engine, GenerateRequest, KVBudget, TokenChunk

__all__ = ["ResubmittingEngine"]


class ResubmittingEngine:
    """Keeps the contract of ``engine`` without its sessions. Closing it leaves the engine open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls = itertools.count()

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    @property
    def kv_budget(self) -> KVBudget:
        real = self._engine.kv_budget
        return replace(real, max_sequences=sys.maxsize, max_tokens=sys.maxsize)

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        name = f"{request.session}/call{next(self._calls)}"
        anew = replace(request, session=name)
        stream = cast(AsyncGenerator[TokenChunk], self._engine.generate(anew))
        try:
            async with aclosing(stream):
                async for chunk in stream:
                    yield chunk
        finally:
            await self._engine.release(name)

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        return [f"{session}/fork{next(self._calls)}" for _ in range(n)]

    async def truncate(self, session: str, at_token: int) -> None:
        pass

    async def release(self, session: str) -> None:
        pass

    async def update_weights(self, version: int) -> None:
        await self._engine.update_weights(version)

    async def aclose(self) -> None:
        pass
