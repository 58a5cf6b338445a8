"""The embedded engine's thread: who advances in each step, and what becomes of the new tokens.

One thread owns the model, the cache and the session table; everybody else sends it commands::

    event loop: generate() --submit--> [commands] --> | a block for each running sequence's next
                fork() truncate() ... ------------->  |   token; the youngest stop if none is left
                                                      | compose: 1 token per decoding sequence,
                                                      |   <= 512 tokens of prefill, admitting
                                                      |   sequences that wait on the way
                stream.get() <--one wake-up per step--| copy tails, forward, sample, watch, finish

A step never waits for anyone: a sequence that pauses for a tool is simply not in it. Nor can steps
stand still: the oldest sequence gets what it needs, at the cost of all others, and the pool holds
at least one of any length.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from thor_fast.engines.base import FinishReason, GenerateRequest, TokenChunk
from thor_fast.engines.decode_graph import DecodeGraphs
from thor_fast.engines.fused_model import fuse
from thor_fast.engines.model_twin import Step, forward, shadow
from thor_fast.engines.paged_attention import Chunk, KVPool, PagedStep
from thor_fast.engines.sampling import SamplingRow, noise_key, sample
from thor_fast.engines.sessions import Session, SessionTable
from thor_fast.engines.token_stream import TokenStream, hand_over
from thor_fast.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EngineCounters", "StepLoop"]

# What a step may prefill. Decoding sequences wait for it: 512 tokens take the tiny policy 18 ms on
# one core, where a step that only decodes takes 4 to 8.
_PREFILL_TOKENS = 512
# Tokens are handed over in chunks: the event loop shares the GIL with the steps. Measured with the
# tiny policy on one core, 1 token per chunk: 457, 2550 and 6123 tokens/s for 1, 8 and 32
# sequences; 16: 532, 3098 and 6758 (transformers' generate: 487, 2296 and 5281).
_CHUNK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals since the engine started.

    ``calls``: ``generate`` calls admitted. ``prefill_tokens``: context tokens computed because the
    cache did not hold them. ``prefix_tokens``: context tokens that a session did not hold itself
    and took from the prefix cache. ``decode_tokens``: tokens sampled. ``steps``: forwards.
    ``evictions``: sessions that lost their KV while not running. ``preemptions``: running calls
    that did, to be prefilled again.
    """

    calls: int = 0
    prefill_tokens: int = 0
    prefix_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    evictions: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    """One ``generate`` call in flight."""

    request: GenerateRequest
    stream: TokenStream
    session: Session
    key: int
    sampled: int = 0
    admitted: bool = False
    prefill_tokens: int | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def take_chunk(self, finish: FinishReason | None) -> TokenChunk:
        """What has been sampled since the last chunk."""
        chunk = TokenChunk(tuple(self.ids), tuple(self.logprobs), finish, self.prefill_tokens)
        self.ids, self.logprobs, self.prefill_tokens = [], [], None
        return chunk


def _forward_of(model: PreTrainedModel) -> Callable[[Step], torch.Tensor]:
    """What turns a step into logits: the fused model, or its own modules."""
    twin = shadow(model)
    fused = fuse(twin)
    return partial(forward, twin) if fused is None else fused.forward


class StepLoop:
    """Runs steps on its own thread while any sequence is live. See the module's diagram."""

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KVPool,
        table: SessionTable,
        graphs: DecodeGraphs | None,
        *,
        max_sequences: int,
        max_context: int,
    ) -> None:
        self._source = model
        self._forward = _forward_of(model)
        self._pool, self.table, self._graphs = pool, table, graphs
        self._max_sequences, self._max_context = max_sequences, max_context
        self.counters = EngineCounters()
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._ending: EngineError | None = None
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._thread = threading.Thread(target=self._run, name="thor-fast-engine", daemon=True)
        self._thread.start()

    # Called from the event loop.

    def post(self, command: Callable[[], None]) -> None:
        """Run ``command`` on the engine's thread, between two steps, in the order posted.

        Raises ``EngineError`` if the thread has ended.
        """
        with self._wake:
            if self._ending is not None:
                raise EngineError(str(self._ending))
            self._commands.append(command)
            self._wake.notify()

    def stop(self, reason: str) -> None:
        """End the thread after the step it is in; every stream raises ``reason``."""
        with self._wake:
            if self._ending is None:
                self._ending = EngineError(reason)
            self._wake.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        # A garbage collection may run on the thread itself and end up here.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # Everything below runs on the engine's thread.

    def start(self, request: GenerateRequest, stream: TokenStream) -> None:
        """Begin a call as soon as there is room for it."""
        session = self.table.open(request.session)
        if session.busy:
            error = EngineError(f"session {session.name!r} is generating, expected it idle")
            hand_over([(stream, error)])
            return
        self.table.touch(session, busy=True)
        sequence = _Sequence(request, stream, session, noise_key(request.sampling.seed))
        self._waiting.append(sequence)

    def cancel(self, stream: TokenStream) -> None:
        """Stop the call behind ``stream``, keep its session."""
        for sequence in (*self._running, *self._waiting):
            if sequence.stream is stream:
                self._drop(sequence)

    def release(self, name: str) -> None:
        """Forget a session; a call in flight on it fails."""
        for sequence in (*self._running, *self._waiting):
            if sequence.session.name == name:
                self._drop(sequence)
                error = EngineError(f"session {name!r} was released while it was generating")
                hand_over([(sequence.stream, error)])
        self.table.release(name)

    def invalidate(self, version: int) -> None:
        """New weights: sequences in flight go on from a prefill of all they have."""
        if self._graphs is not None:
            self._graphs.drop()
        # Anew: of copies, and in case the trainer put new tensors in place of the old ones.
        del self._forward  # first, lest there are two copies at once
        self._forward = _forward_of(self._source)
        self.table.invalidate(version)
        while self._running:
            self._suspend(self._running[-1])

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._next_turn():
                    if self._running or self._waiting:
                        self._step()
        except Exception as error:  # noqa: BLE001 - whatever broke, the callers must hear of it
            self.stop(f"the engine broke: {type(error).__name__}: {error}")
        self._fail_all()

    def _next_turn(self) -> bool:
        """Run pending commands; sleeps while there is nothing to do, False once told to stop."""
        with self._wake:
            while not (self._commands or self._running or self._waiting or self._ending):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return self._ending is None

    def _grow(self) -> None:
        """Each running sequence gets room for its next tokens, the oldest first."""
        for sequence in list(self._running):
            session = sequence.session
            while session.running and not self.table.reserve(session, len(session.ids), evict=True):
                self._suspend(self._running[-1])
                self._count(preemptions=1)

    def _suspend(self, sequence: _Sequence) -> None:
        """Back to the head of the queue, without KV."""
        self._running.remove(sequence)
        self.table.cool(sequence.session)
        self.table.touch(sequence.session, busy=True)
        self._waiting.appendleft(sequence)

    def _compose(self) -> list[tuple[_Sequence, Chunk]]:
        """The sequences of one step and their new tokens: decoding ones, then prefill.

        Waiting sequences join while there is room, first come, first served; where blocks may run
        short those whose session holds KV go first, since they are nearer to giving it back. They
        join one by one, so that each finds in the prefix cache what the ones before it compute in
        this same step.
        """
        pairs: list[tuple[_Sequence, Chunk]] = []
        budget = _PREFILL_TOKENS
        for sequence in self._running:
            budget -= self._add(pairs, sequence, budget)
        blocked = False
        # In turn as long as it costs nothing: what has begun last, alone, ends last.
        in_turn = self.table.ample
        for sequence in sorted(self._waiting, key=lambda s: not (in_turn or s.session.blocks)):
            if not budget or len(self._running) >= self._max_sequences:
                break
            if not sequence.session.blocks and blocked:
                continue
            if self._admit(sequence):
                budget -= self._add(pairs, sequence, budget)
            else:
                blocked = True
        # Rows of like length are gathered together, see paged_attention.
        pairs.sort(key=lambda p: (len(p[1].ids) > 1, -p[1].start))
        return pairs

    def _admit(self, sequence: _Sequence) -> bool:
        """Start a waiting sequence if there is room.

        One that holds no KV takes that of paused sessions only if nothing could run otherwise:
        then the choice is between computing it again later and standing still.
        """
        session = sequence.session
        ids = session.ids if sequence.admitted else sequence.request.token_ids
        evict = bool(session.blocks) or not self._running
        missing = self.table.admit(session, ids, evict=evict)
        if missing is None:
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        if not sequence.admitted:
            sequence.admitted, sequence.prefill_tokens = True, missing
            self._count(calls=1)
        return True

    def _add(self, pairs: list[tuple[_Sequence, Chunk]], sequence: _Sequence, budget: int) -> int:
        """Add the next tokens of a sequence; returns how many of them the budget pays for."""
        session = sequence.session
        missing = len(session.ids) - session.cached
        size = 1 if missing == 1 else min(missing, budget)
        if size:
            start, new = session.cached, session.ids[session.cached : session.cached + size]
            pairs.append((sequence, Chunk(session.blocks, start, new)))
            self.table.advance(session, size)
            if size > 1 or sequence.sampled == 0:
                self._count(prefill_tokens=size)
        return size if missing > 1 else 0

    def _count(self, **more: int) -> None:
        now = {name: getattr(self.counters, name) + n for name, n in more.items()}
        self.counters = replace(self.counters, **now)

    def _step(self) -> None:
        self._grow()
        pairs = self._compose()
        self._pool.copy_tails(self.table.take_copies())
        logits = self._logits([chunk for _, chunk in pairs])
        complete = [i for i, (s, _) in enumerate(pairs) if s.session.cached == len(s.session.ids)]
        if len(complete) < len(pairs):
            logits = logits[complete]
        sequences = [pairs[i][0] for i in complete]
        self._count(steps=1, decode_tokens=len(sequences))
        if sequences:
            rows = [SamplingRow(s.request.sampling, s.key, len(s.session.ids)) for s in sequences]
            tokens, logprobs = sample(logits, rows)
            self._take(sequences, tokens.tolist(), logprobs.tolist())

    def _logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """After the last token of each chunk."""
        if self._graphs is not None and all(len(chunk.ids) == 1 for chunk in chunks):
            return self._graphs.logits(self._forward, chunks)
        return self._forward(PagedStep(self._pool, chunks))

    def _take(self, sequences: list[_Sequence], tokens: list[int], logprobs: list[float]) -> None:
        """Append a sampled token to each sequence, end those that are done, tell their streams."""
        items: list[tuple[TokenStream, TokenChunk | EngineError]] = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            if not np.isfinite(logprob):
                self._drop(sequence)
                self._pool.clear(self.table.spoil(sequence.session))
                error = f"logits of session {sequence.session.name!r} are not finite"
                items.append((sequence.stream, EngineError(error)))
                continue
            sequence.session.ids.append(token)
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.sampled += 1
            try:
                finish = self._finish(sequence, token)
            except Exception as error:  # noqa: BLE001 - the caller's watch; only its stream fails
                self._drop(sequence)
                message = f"watch raised {type(error).__name__}: {error}, expected a bool"
                items.append((sequence.stream, EngineError(message)))
                continue
            if finish is not None:
                self._drop(sequence)
            if finish is not None or len(sequence.ids) >= _CHUNK_TOKENS:
                items.append((sequence.stream, sequence.take_chunk(finish)))
        hand_over(items)

    def _finish(self, sequence: _Sequence, token: int) -> FinishReason | None:
        request = sequence.request
        # Asked first, and always: a watcher that counts tokens must see every one of them.
        watched = request.watch is not None and request.watch(token)
        if token in request.stop_token_ids:
            return FinishReason.STOP
        if watched:
            return FinishReason.WATCH
        if sequence.sampled >= request.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.session.ids) >= self._max_context:
            return FinishReason.CONTEXT
        return None

    def _drop(self, sequence: _Sequence) -> None:
        """Take a sequence out of the running; its session keeps tokens and KV."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.table.touch(sequence.session, busy=False)

    def _fail_all(self) -> None:
        """Last act of the thread. Commands that came too late run: they end in the same error."""
        assert self._ending is not None
        with self._wake:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        hand_over(
            (s.stream, EngineError(str(self._ending))) for s in (*self._running, *self._waiting)
        )
        self._running, self._waiting = [], deque()
