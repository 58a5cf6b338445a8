"""The way of tokens from the engine's thread to the coroutine that asked for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable

from thor_fast.engines.base import TokenChunk
from thor_fast.errors import EngineError

__all__ = ["TokenStream", "hand_over"]


class TokenStream:
    """Chunks of one ``generate`` call, in order. Lives on ``loop``; only the loop touches it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ended = False
        self._items: deque[TokenChunk | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: TokenChunk | EngineError) -> None:
        """Append a chunk, or the error that ends the stream."""
        if isinstance(item, EngineError) or item.finish is not None:
            self.ended = True
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def drained(self) -> bool:
        """True once the stream has ended and everything in it was read."""
        return self.ended and not self._items

    async def get(self) -> TokenChunk:
        """The next chunk; raises the ``EngineError`` that ended the stream."""
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, EngineError):
            raise item
        return item


def hand_over(items: Iterable[tuple[TokenStream, TokenChunk | EngineError]]) -> None:
    """Deliver one step's items from another thread: one wake-up per event loop, not per stream."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, TokenChunk | EngineError]]]
    by_loop = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, batch in by_loop.items():
        # RuntimeError: the loop was closed with streams in flight, and nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[TokenStream, TokenChunk | EngineError]]) -> None:
    for stream, item in batch:
        stream.put(item)
