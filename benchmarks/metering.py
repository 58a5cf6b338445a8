"""What a rollout's wall time went into: counted at the engine's and the sandbox's own doors.

All ways of rolling out are measured by the same wrappers, so that none can flatter itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import cast

from thor_fast.engines.base import Capabilities, Engine, GenerateRequest, KVBudget, TokenChunk
from thor_fast.sandbox.base import ClosedOnExit, ExecutionStream, Sandbox, StreamingSandbox
from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["Meter", "MeteredEngine", "MeteredSandbox", "MeteredStreams", "RecordedSandbox"]


@dataclass(slots=True)
class Meter:
    """Totals of one rollout; seconds are wall time.

    At any moment either some call is with the engine or none is, and some snippet is with the
    sandbox (queueing there included) or none is. ``tools_hidden_s``: both. ``tools_exposed_s``: a
    snippet, and nothing that decodes. ``tool_s`` adds up the calls, so ten at a time count tenfold.
    ``sampled``: by session, each sampled token under its position in the sequence.

    ``least_prefill_tokens``: what calls would prefill at the least, if the engine kept everything:
    the prompt at first, then what is new and one token, whose KV no sampling has left behind.
    ``calls_evicted``: those that prefilled more than a block above that: the KV was gone.
    """

    tool_calls: int = 0
    tool_s: float = 0.0
    tools_hidden_s: float = 0.0
    tools_exposed_s: float = 0.0
    engine_calls: int = 0
    sampled_tokens: int = 0
    prefill_tokens: int | None = 0
    least_prefill_tokens: int = 0
    calls_evicted: int = 0
    most_live_tokens: int = 0
    sampled: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _lengths: dict[str, int] = field(default_factory=dict)
    _decoding: int = 0
    _tools: int = 0
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """A call is with the engine."""
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def tool(self) -> Iterator[None]:
        """A snippet is with the sandbox; callable from any thread."""
        started = time.perf_counter()
        self._change(0, 1)
        try:
            yield
        finally:
            self._change(0, -1)
            with self._lock:
                self.tool_calls += 1
                self.tool_s += time.perf_counter() - started

    def took(
        self, request: GenerateRequest, n_before: int, chunk: TokenChunk, engine: Engine
    ) -> None:
        """Count a chunk that follows ``n_before`` tokens of the same call."""
        start = len(request.token_ids) + n_before
        self.sampled.setdefault(request.session, []).extend(enumerate(chunk.token_ids, start))
        self.sampled_tokens += len(chunk.token_ids)
        if n_before == 0:
            self.engine_calls += 1
            budget = engine.kv_budget  # counted by the engine then, so not for every chunk
            self.most_live_tokens = max(self.most_live_tokens, budget.live_tokens)
            known = self._lengths.get(request.session)
            least = start if known is None else start - known + 1
            self.least_prefill_tokens += least
            if chunk.prefill_tokens is None or self.prefill_tokens is None:
                self.prefill_tokens = None
            else:
                self.prefill_tokens += chunk.prefill_tokens
                self.calls_evicted += chunk.prefill_tokens > least + budget.block_tokens
        self._lengths[request.session] = start + len(chunk.token_ids)

    def dropped(self, session: str, at_token: int) -> None:
        """The caller threw away what was sampled from position ``at_token`` on."""
        sampled = self.sampled.get(session, [])
        kept = [pair for pair in sampled if pair[0] < at_token]
        self.sampled_tokens -= len(sampled) - len(kept)
        self.sampled[session] = kept
        self._lengths[session] = min(self._lengths[session], at_token)

    def _change(self, decoding: int, tools: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._tools:
                if self._decoding:
                    self.tools_hidden_s += now - self._since
                else:
                    self.tools_exposed_s += now - self._since
            self._since = now
            self._decoding += decoding
            self._tools += tools


class MeteredEngine:
    """An engine whose calls are counted. Closing it leaves the engine open."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    @property
    def kv_budget(self) -> KVBudget:
        return self._engine.kv_budget

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        n_before = 0
        stream = cast(AsyncGenerator[TokenChunk], self._engine.generate(request))
        with self._meter.decoding():
            async with aclosing(stream):
                async for chunk in stream:
                    self._meter.took(request, n_before, chunk, self._engine)
                    n_before += len(chunk.token_ids)
                    yield chunk

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        return await self._engine.fork(session, n, at_token)

    async def truncate(self, session: str, at_token: int) -> None:
        self._meter.dropped(session, at_token)
        await self._engine.truncate(session, at_token)

    async def release(self, session: str) -> None:
        await self._engine.release(session)

    async def update_weights(self, version: int) -> None:
        await self._engine.update_weights(version)

    async def aclose(self) -> None:
        pass


class MeteredSandbox(ClosedOnExit):
    """A sandbox whose calls are counted. Closing it leaves the sandbox open."""

    def __init__(self, sandbox: Sandbox, meter: Meter) -> None:
        self._sandbox, self._meter = sandbox, meter

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        with self._meter.tool():
            return self._sandbox.execute(request)

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        with self._meter.tool():
            return self._sandbox.execute_batch(requests)

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        with self._meter.tool():
            return await self._sandbox.submit(request)

    def close(self) -> None:
        pass


class MeteredStreams(MeteredSandbox):
    """As :class:`MeteredSandbox`, for one with streams: what counts is the wait for the result."""

    def __init__(self, sandbox: StreamingSandbox, meter: Meter) -> None:
        super().__init__(sandbox, meter)
        self._open = sandbox.open

    def open(self, request: ExecutionRequest | None = None) -> ExecutionStream:
        return _MeteredStream(self._open(request), self._meter)


class _MeteredStream:
    def __init__(self, stream: ExecutionStream, meter: Meter) -> None:
        self._stream, self._meter = stream, meter
        self.feed, self.close = stream.feed, stream.close

    async def afinish(self, rest: str = "") -> ExecutionResult:
        with self._meter.tool():
            return await self._stream.afinish(rest)


class RecordedSandbox(MeteredSandbox):
    """Tools that cost nothing: what a snippet gave before is given again at once.

    ``recorded``: results by code. What is not in it runs, and is counted.
    """

    def __init__(
        self, sandbox: Sandbox, meter: Meter, recorded: Mapping[str, ExecutionResult]
    ) -> None:
        super().__init__(sandbox, meter)
        self._recorded = recorded

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        code = request if isinstance(request, str) else request.code
        known = self._recorded.get(code)
        return await super().submit(request) if known is None else known
