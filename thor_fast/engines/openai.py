"""A server that speaks OpenAI's completions protocol as the engine: token ids in and out.

Every ``generate`` call is one streamed completion over the whole context; the server's prefix cache
makes that cheap. Sessions are names and lengths here: forking and truncating are true with the next
request. A connection that is refused or breaks is tried again, from the tokens that have come.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from thor_fast.engines.base import (
    Capabilities,
    FinishReason,
    GenerateRequest,
    KVBudget,
    TokenChunk,
    check_context,
    check_position,
)
from thor_fast.engines.openai_wire import Event, body, parse_event
from thor_fast.errors import EngineError

__all__ = ["OpenAIEngine"]

# Attempts without a token in between, and the seconds before the second; then twice as long each.
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.2
# A server that is starting, overloaded or behind a proxy; anything else will not get better.
_TRY_AGAIN = frozenset({429, 502, 503, 504})
_CONNECT_S = 10.0
# Ids are the server's to check: the protocol does not tell the size of the vocabulary.
_ANY_ID = 1 << 31


class _BrokenError(Exception):
    """The connection failed; the message says how."""


def _future() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class _Session:
    """``length``: tokens of the context and samples so far. ``ended``: set from outside."""

    length: int = 0
    busy: bool = False
    ended: asyncio.Future[str] = field(default_factory=_future)


class OpenAIEngine:
    """``Engine`` over HTTP (tested: vLLM 0.32's server); needs ``pip install 'thor_fast[openai]'``.

    ``base_url``: up to and with ``/v1``. ``model``: its name there. ``max_context`` must not exceed
    the server's; ``max_sequences`` is what the caller wants to keep live there. The protocol tells
    neither that nor the size of its KV pool, so ``kv_budget.max_tokens`` is only their product.
    ``pause_token_ids``: as :class:`~thor_fast.engines.vllm.VLLMEngine` has them. ``timeout_s``: how
    long the server may say nothing.

    - **Log-probs** are what the server calls so. vLLM's are those before temperature unless it runs
      with ``--logprobs-mode processed_logprobs``, so a temperature other than 0 and 1 is refused
      unless ``processed_logprobs`` says that it does. Top-k and top-p are refused as in
      ``VLLMEngine``, unless greedy.
    - **Noise** is seeded per request, as in ``VLLMEngine``; a connection that broke cuts a call.
    - **Weights** are the server's affair: load them there, then call ``update_weights``, which has
      later calls cached apart (``cache_salt``). Calls in flight go on.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        max_sequences: int,
        max_context: int,
        pause_token_ids: frozenset[int] = frozenset(),
        processed_logprobs: bool = False,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if max_sequences < 1:
            raise EngineError(f"max_sequences is {max_sequences}, expected at least 1")
        if max_context < 2:
            raise EngineError(f"max_context is {max_context}, expected at least 2")
        self._http = _httpx()
        self._url = f"{base_url.rstrip('/')}/completions"
        self._client = self._http.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=self._http.Timeout(timeout_s, connect=_CONNECT_S),
            # Its own limit would have calls wait for each other here.
            limits=self._http.Limits(max_connections=None),
        )
        self._model, self._max_sequences, self._max_context = model, max_sequences, max_context
        self._pause_token_ids, self._processed = pause_token_ids, processed_logprobs
        self._sessions: dict[str, _Session] = {}
        self._forks = itertools.count()
        self._weight_version = 0
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            max_context=self._max_context, watch=False, native_fork=False, native_truncate=False
        )

    @property
    def kv_budget(self) -> KVBudget:
        return KVBudget(
            max_sequences=self._max_sequences,
            max_tokens=self._max_sequences * self._max_context,
            live_sequences=len(self._sessions),
            live_tokens=sum(session.length for session in self._sessions.values()),
        )

    @property
    def weight_version(self) -> int:
        return self._weight_version

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """Stream tokens; see :meth:`Engine.generate`. ``watch`` is ignored.

        Raises ``EngineError`` for a context too long to start, sampling parameters that would break
        the contract of log-probs, a session that is generating already or is released meanwhile, a
        server that refuses, breaks, cannot be reached or does not keep the protocol, a closed
        engine.
        """
        self._check(request)
        session = self._sessions.setdefault(request.session, _Session())
        if session.busy:
            raise EngineError(f"session {request.session!r} is generating, expected it idle")
        session.busy, session.length = True, len(request.token_ids)
        context = list(request.token_ids)
        finish: FinishReason | None = None
        n_failures = 0
        try:
            while finish is None:
                n_before = len(context)
                try:
                    async with contextlib.aclosing(self._submit(request, context)) as events:
                        while (event := await _next(events, session)) is not None:
                            context += event.token_ids
                            session.length = len(context)
                            finish = self._finish(event, request, context)
                            yield TokenChunk(event.token_ids, event.logprobs, finish)
                except _BrokenError as error:
                    n_failures = 1 if len(context) > n_before else n_failures + 1
                    await self._wait(n_failures, error, session)
        finally:
            session.busy = False

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        self._known(session, at_token)
        if n < 1:
            raise EngineError(f"fork into {n} sessions, expected at least 1")
        names = [f"{session}/{next(self._forks)}" for _ in range(n)]
        self._sessions.update({name: _Session(at_token) for name in names})
        return names

    async def truncate(self, session: str, at_token: int) -> None:
        known = self._known(session, at_token)
        if known.busy:
            raise EngineError(f"session {session!r} is generating, expected it idle to truncate it")
        known.length = at_token

    async def release(self, session: str) -> None:
        """Forget a session; a call in flight on it raises ``EngineError``."""
        known = self._sessions.pop(session, None)
        if known is not None:
            known.ended.set_result(f"session {session!r} was released while it was generating")

    async def update_weights(self, version: int) -> None:
        """Note that the server has new weights; see the class. ``version`` must have grown."""
        if version <= self._weight_version:
            raise EngineError(
                f"weight version is {version}, expected more than {self._weight_version}, "
                "the present one"
            )
        if self._closed:
            raise EngineError("the engine is closed")
        self._weight_version = version

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.ended.set_result("the engine is closed")
        await self._client.aclose()

    def _check(self, request: GenerateRequest) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        check_context(request.token_ids, self._max_context, _ANY_ID)
        sampling = request.sampling
        if sampling.temperature == 0:
            return
        if sampling.temperature != 1 and not self._processed:
            raise EngineError(
                f"temperature is {sampling.temperature}, expected 0 or 1 unless the server has "
                "processed_logprobs"
            )
        if sampling.top_k > 0 or sampling.top_p < 1:
            raise EngineError(
                f"top_k is {sampling.top_k} and top_p {sampling.top_p}, expected 0 and 1: servers "
                "have no log-probs after temperature and before them"
            )

    async def _submit(self, request: GenerateRequest, context: list[int]) -> AsyncGenerator[Event]:
        """The events of one completion; ``_BrokenError`` if the connection does not last."""
        n_sampled = len(context) - len(request.token_ids)
        n_prompt = len(context)
        json = body(
            request,
            context,
            model=self._model,
            max_tokens=min(request.max_tokens - n_sampled, self._max_context - n_prompt),
            stop_token_ids=request.stop_token_ids | self._pause_token_ids,
            cache_salt=f"w{self._weight_version}",
        )
        ended = False
        try:
            async with self._client.stream("POST", self._url, json=json) as response:
                await self._accepted(response, request)
                async for line in response.aiter_lines():
                    event = parse_event(line, request.session)
                    if event is None:
                        continue
                    if event.prompt is not None and list(event.prompt) != context[:n_prompt]:
                        raise EngineError(
                            f"the server read a prompt of {len(event.prompt)} tokens, expected "
                            f"the {n_prompt} that were sent for session {request.session!r}"
                        )
                    ended = event.finish is not None
                    yield event
        except self._http.TransportError as error:
            raise _BrokenError(f"{type(error).__name__}: {error}") from error
        if not ended:
            raise _BrokenError("the stream ended before the completion did")

    async def _accepted(self, response: Any, request: GenerateRequest) -> None:
        """Raise unless the server answers 200."""
        if response.status_code == 200:
            return
        text = " ".join((await response.aread()).decode(errors="replace").split())[:500]
        reason = f"status {response.status_code}: {text}"
        if response.status_code in _TRY_AGAIN:
            raise _BrokenError(reason)
        raise EngineError(
            f"{self._url} answered session {request.session!r} with {reason}, expected 200"
        )

    async def _wait(self, n_failures: int, error: _BrokenError, session: _Session) -> None:
        """Wait before the next attempt; raise after the last one, or if the call was ended."""
        if n_failures >= _ATTEMPTS:
            raise EngineError(
                f"{self._url} failed {n_failures} times ({error}), expected it to answer"
            ) from error
        await asyncio.wait([session.ended], timeout=_FIRST_WAIT_S * 2 ** (n_failures - 1))
        if session.ended.done():
            raise EngineError(session.ended.result())

    def _finish(
        self, event: Event, request: GenerateRequest, context: list[int]
    ) -> FinishReason | None:
        """How the server says that a completion ended, in our words; None at a pause."""
        if event.finish is None:
            return None
        last = context[-1]
        if event.finish == "stop" and last in request.stop_token_ids:
            return FinishReason.STOP
        if event.finish == "length" or last in self._pause_token_ids:
            if len(context) - len(request.token_ids) == request.max_tokens:
                return FinishReason.LENGTH
            if len(context) == self._max_context:
                return FinishReason.CONTEXT
            if event.finish == "stop":
                return None
        raise EngineError(
            f"the server ended session {request.session!r} with {event.finish!r} at token {last} "
            f"after {len(context) - len(request.token_ids)} of {request.max_tokens} tokens, "
            "expected 'stop' at a stop token or 'length' at the last"
        )

    def _known(self, name: str, at_token: int) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            raise EngineError(f"no session {name!r}, expected one that has generated or was forked")
        check_position(name, at_token, session.length)
        return session


async def _next(events: AsyncGenerator[Event], session: _Session) -> Event | None:
    """The next event, None after the last; ``EngineError`` as soon as the call is ended."""
    if not session.ended.done():
        read = asyncio.ensure_future(anext(events, None))
        try:
            either: list[asyncio.Future[Any]] = [read, session.ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not read.done():
                read.cancel()
                await asyncio.wait([read])
        if not session.ended.done():
            return read.result()
        if not read.cancelled():
            read.exception()  # seen: it is no longer of interest
    raise EngineError(session.ended.result())


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx2")
    except ImportError as error:
        raise EngineError(
            f"cannot import httpx2 ({error}), expected pip install 'thor_fast[openai]'"
        ) from error
