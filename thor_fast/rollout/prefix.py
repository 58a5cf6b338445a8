"""The KV of what all samples of a group begin with: computed once, forked for the others.

Who waits for whom::

    first sample                 engine                       a later one
    ------------                 ------                       -----------
    generate, one token ------>  prefill the prefix           waits for the first's prefill
    <-- its first token --------
    generates on                 <-- fork(first, at prefix) - goes on from there, one token to
                                                              compute

A holder of the prefix is whoever is live and has it, so nothing is kept for its sake. Where no
holder is left, the next one computes it again (or finds it in the engine's prefix cache). Ending
the first call after one token changes no token and costs one call, not one more step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from thor_fast.engines.base import Engine
from thor_fast.errors import EngineError

__all__ = ["SharedPrefix", "Start"]

Grown = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Start:
    """How a sample begins, for :func:`run_episode`: its session, and what it is told and given."""

    session: str
    grown: Grown
    first_tokens: int | None = None


class SharedPrefix:
    """For one group on an engine with ``native_fork``; its samples begin with ``n_tokens``."""

    def __init__(self, engine: Engine, n_tokens: int) -> None:
        self._engine, self._n_tokens = engine, n_tokens
        self._holders: list[str] = []
        self._filling: asyncio.Event | None = None  # set once it is filled, or cannot be

    @asynccontextmanager
    async def start(self, name: str, grown: Grown) -> AsyncGenerator[Start]:
        """How one sample begins; :func:`run_episode` releases its session.

        ``name`` is taken where there is nobody to fork from.
        """
        while self._filling is not None:
            await self._filling.wait()
        if not self._holders:
            self._filling = asyncio.Event()
            try:
                yield Start(name, self._filler(name, grown), first_tokens=1)
            finally:
                self._filled()
                self._discard(name)
            return
        forked = await self._fork(self._holders[0])
        if forked is None:
            yield Start(name, grown)
            return
        self._holders.append(forked)
        try:
            yield Start(forked, grown)
        finally:
            self._discard(forked)

    def _filler(self, name: str, grown: Grown) -> Grown:
        def filling(n_tokens: int) -> None:
            grown(n_tokens)
            if n_tokens > self._n_tokens and self._filling is not None:
                self._holders.append(name)
                self._filled()

        return filling

    def _filled(self) -> None:
        if self._filling is not None:
            self._filling.set()
            self._filling = None

    def _discard(self, name: str) -> None:
        if name in self._holders:
            self._holders.remove(name)

    async def _fork(self, holder: str) -> str | None:
        """A session of its own; ``None`` if the holder has just ended, or the engine broke."""
        fork = asyncio.ensure_future(self._engine.fork(holder, 1, self._n_tokens))
        try:
            (name,) = await asyncio.shield(fork)
        except EngineError:
            return None  # where the engine is broken, the episode will say so
        except asyncio.CancelledError:
            # The engine may have forked already: nobody else would release it.
            await asyncio.wait([fork])
            if not fork.cancelled() and fork.exception() is None:
                await self._engine.release(fork.result()[0])
            raise
        return name
