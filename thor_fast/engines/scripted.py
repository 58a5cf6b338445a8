"""An engine that plays given tokens: for tests, and to time everything around a model.

It keeps the whole contract of :mod:`thor_fast.engines.base`, down to counting what a KV cache
would have had to prefill, but nothing is computed. Sequences do not slow each other down: each
token takes ``token_s``, as on a GPU that is far from full.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from thor_fast.engines.base import (
    Capabilities,
    FinishReason,
    GenerateRequest,
    KVBudget,
    TokenChunk,
    check_position,
)
from thor_fast.errors import EngineError

__all__ = ["Script", "ScriptedEngine"]

_LOGPROB = -0.5


@dataclass(frozen=True, slots=True)
class Script:
    """The tokens the model is to "sample" in one sequence, observations left out.

    ``logprobs``: one per token, or ``None`` for -0.5 each. ``fail_at``: index of the token whose
    sampling raises ``EngineError``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    fail_at: int | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"script has {len(self.logprobs)} log-probs, expected {len(self.token_ids)}"
            )


@dataclass(slots=True)
class _Session:
    """``tokens``: context and samples so far. ``played``: where in it each script token went.

    ``held``: how many of ``tokens`` a KV cache would hold.
    """

    script: Script
    tokens: list[int] = field(default_factory=list)
    played: list[int] = field(default_factory=list)
    held: int = 0

    def rewind(self, at_token: int) -> None:
        del self.tokens[at_token:]
        self.played = [p for p in self.played if p < at_token]
        self.held = min(self.held, at_token)


class ScriptedEngine:
    """Plays ``scripts[context]`` to a session that starts with exactly that context.

    The k-th session to start from a context plays its k-th script, round and round. A forked
    session looks its context up in the same way (a script per branch), and plays its parent's
    script on if there is none. ``chunk_tokens``: tokens per chunk; with ``watch=False`` that many
    can run past a fence. ``max_sequences``: holding more sessions is an ``EngineError``, so that a
    scheduler which admits too many is found out. A call that finds more than ``kv_tokens`` tokens
    (by default enough for all of them), counted in blocks of ``block_tokens``, has the KV of others
    forgotten, the oldest first, and ``evictions`` counts them; if it does not fit alone, it is an
    ``EngineError``. ``token_s``: seconds per token.
    """

    def __init__(
        self,
        scripts: Mapping[tuple[int, ...], Sequence[Script]],
        *,
        watch: bool = True,
        token_s: float = 0.0,
        chunk_tokens: int = 1,
        max_context: int = 1 << 20,
        max_sequences: int = 256,
        kv_tokens: int | None = None,
        block_tokens: int = 1,
    ) -> None:
        empty = [context for context, choices in scripts.items() if not choices]
        if empty:
            raise ValueError(f"context {empty[0]} has no scripts, expected at least one each")
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}, expected >= 1")
        self._scripts = {context: itertools.cycle(choices) for context, choices in scripts.items()}
        self._sessions: dict[str, _Session] = {}
        self._token_s = token_s
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._kv_tokens = max_sequences * max_context if kv_tokens is None else kv_tokens
        self._block_tokens = block_tokens
        self._capabilities = Capabilities(max_context, watch, True, True)
        self._version = 0
        self._n_forks = itertools.count()
        self.evictions = 0
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def kv_budget(self) -> KVBudget:
        return KVBudget(
            max_sequences=self._max_sequences,
            max_tokens=self._kv_tokens,
            live_sequences=len(self._sessions),
            live_tokens=self._in_blocks(s.held for s in self._sessions.values()),
            block_tokens=self._block_tokens,
        )

    @property
    def weight_version(self) -> int:
        return self._version

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        if len(request.token_ids) >= self._capabilities.max_context:
            raise EngineError(
                f"context has {len(request.token_ids)} tokens, expected fewer than max_context "
                f"{self._capabilities.max_context}"
            )
        session = self._open(request)
        prefill: int | None = len(request.token_ids) - session.held
        n_sampled = 0
        finish: FinishReason | None = None
        while finish is None:
            start = n_sampled
            while finish is None and n_sampled - start < self._chunk_tokens:
                await asyncio.sleep(self._token_s)
                token_id = self._sample(session, request.session)
                n_sampled += 1
                finish = self._finish(request, token_id, n_sampled)
            session.held = len(session.tokens)
            yield _chunk(session, n_sampled - start, finish, prefill)
            prefill = None

    async def fork(self, session: str, n: int, at_token: int) -> list[str]:
        parent = self._get(session, at_token)
        names = [f"{session}/fork{next(self._n_forks)}" for _ in range(n)]
        for name in names:
            self._check_room()
            child = _Session(parent.script, parent.tokens[:], parent.played[:], parent.held)
            child.rewind(at_token)
            choices = self._scripts.get(tuple(child.tokens))
            if choices is not None:
                child.script, child.played = next(choices), []
            self._sessions[name] = child
        return names

    async def truncate(self, session: str, at_token: int) -> None:
        self._get(session, at_token).rewind(at_token)

    async def release(self, session: str) -> None:
        self._sessions.pop(session, None)

    async def update_weights(self, version: int) -> None:
        if version <= self._version:
            raise EngineError(f"weight version is {version}, expected above {self._version}")
        self._version = version
        for session in self._sessions.values():
            session.held = 0

    async def aclose(self) -> None:
        self._closed = True
        self._sessions.clear()

    def _open(self, request: GenerateRequest) -> _Session:
        """The session, rewound to what it shares with the request and holding the request."""
        session = self._sessions.get(request.session)
        if session is None:
            session = self._sessions[request.session] = self._start(request)
        shared = 0
        for ours, theirs in zip(session.tokens, request.token_ids, strict=False):
            if ours != theirs:
                break
            shared += 1
        session.rewind(shared)
        session.tokens.extend(request.token_ids[shared:])
        self._make_room(session)
        return session

    def _start(self, request: GenerateRequest) -> _Session:
        self._check_room()
        choices = self._scripts.get(request.token_ids)
        if choices is None:
            raise EngineError(
                f"no script for a context of {len(request.token_ids)} tokens, expected one of "
                f"the {len(self._scripts)} contexts given"
            )
        return _Session(next(choices))

    def _get(self, name: str, at_token: int) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            raise EngineError(f"no session {name!r}, expected one of {sorted(self._sessions)}")
        check_position(name, at_token, len(session.tokens))
        return session

    def _check_room(self) -> None:
        if len(self._sessions) >= self._max_sequences:
            raise EngineError(
                f"{len(self._sessions) + 1} sequences at once, expected at most "
                f"{self._max_sequences}"
            )

    def _in_blocks(self, lengths: Iterable[int]) -> int:
        return sum(-(-n // self._block_tokens) for n in lengths) * self._block_tokens

    def _make_room(self, session: _Session) -> None:
        others = [s for s in self._sessions.values() if s is not session and s.held]
        while True:
            used = self._in_blocks([len(session.tokens), *(s.held for s in others)])
            if used <= self._kv_tokens:
                return
            if not others:
                raise EngineError(f"{used} tokens at once, expected at most {self._kv_tokens}")
            others.pop(0).held = 0
            self.evictions += 1

    def _sample(self, session: _Session, name: str) -> int:
        if self._closed:
            raise EngineError("engine is closed, expected an open one")
        script = session.script
        index = len(session.played)
        if index == script.fail_at:
            raise EngineError(f"script says to fail at token {index} (session {name!r})")
        if index >= len(script.token_ids):
            raise EngineError(
                f"script of session {name!r} is used up after {index} tokens, expected it to end "
                "in a stop token"
            )
        session.played.append(len(session.tokens))
        session.tokens.append(script.token_ids[index])
        return script.token_ids[index]

    def _finish(
        self, request: GenerateRequest, token_id: int, n_sampled: int
    ) -> FinishReason | None:
        watch = request.watch if self._capabilities.watch else None
        if watch is not None and watch(token_id):
            return FinishReason.WATCH
        if token_id in request.stop_token_ids:
            return FinishReason.STOP
        if len(request.token_ids) + n_sampled >= self._capabilities.max_context:
            return FinishReason.CONTEXT
        return FinishReason.LENGTH if n_sampled == request.max_tokens else None


def _chunk(
    session: _Session, n_tokens: int, finish: FinishReason | None, prefill: int | None
) -> TokenChunk:
    """The last ``n_tokens`` of a session as a chunk."""
    stop = len(session.played)
    given = session.script.logprobs
    logprobs = given[stop - n_tokens : stop] if given is not None else (_LOGPROB,) * n_tokens
    return TokenChunk(tuple(session.tokens[-n_tokens:]), logprobs, finish, prefill)
