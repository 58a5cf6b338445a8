"""THE loop: one episode, from the prompt to its ``StopReason``.

Who waits for whom (one column each; time runs down)::

    run_episode               engine (its own thread)         sandbox (its own processes)
    -----------               -----------------------         ---------------------------
    generate(context) ------> prefill what its cache lacks
    awaits the stream         sample, watch(token): is a
                              closing fence complete?  --no-> sample the next one
    <-- draft of the block -- a statement of it is
    feed(draft) -------------------------------------------> run that (see early.py)
    <-- last chunk, WATCH --- yes: this sequence pauses,
                              the others go on
    run(code) ---------------------------------------------> run the snippet, or the rest of it
    awaits the result         (free for other episodes)
    <-- ExecutionResult -------------------------------------
    tokenise the observation only, append it
    generate(context + observation) ...

An episode waits for nobody but its own engine call and its own snippet: there is no barrier between
episodes. One block costs one engine call, ended at the *closing* fence. Where the engine cannot ask
``watch`` in step, the tokens come here first, those behind the fence are dropped and the engine is
told to forget them.

Each kept token is shown to the detector once. Tokens are appended as they were sampled, with their
log-probs, and never encoded again. Whatever happens to model, sandbox or engine is recorded in the
trajectory; what raises out of here is a bug, misuse, or cancellation.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from thor_fast.engines.base import Engine, FinishReason, GenerateRequest, SamplingParams, TokenChunk
from thor_fast.errors import DataError, EngineError
from thor_fast.rollout.early import EarlyRuns
from thor_fast.rollout.early_gain import EarlyGain
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.memo import SnippetMemo
from thor_fast.rollout.splice import splice_observation
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import DetectedCall, Tool, ToolDetector
from thor_fast.types import (
    ExecutionResult,
    Segment,
    Status,
    StopReason,
    TokenSource,
    ToolCall,
    Trajectory,
)

__all__ = ["run_episode"]


async def run_episode(
    engine: Engine,
    sandbox: Sandbox,
    tool: Tool,
    prompt_ids: Sequence[int],
    limits: RolloutLimits,
    *,
    encode: Callable[[str], Sequence[int]],
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
    session: str,
    room: Callable[[int], Awaitable[int]] | None = None,
    memo: SnippetMemo | None = None,
    gain: EarlyGain | None = None,
    trajectory: Trajectory | None = None,
) -> Trajectory:
    """Run one episode and return its trajectory, which has a ``stop_reason``.

    ``encode``: observation text -> ids (:class:`~thor_fast.rollout.splice.ObservationEncoder`).
    ``session``: a name no other live episode uses; released at the end, whatever the end.
    ``room``: asked before each engine call how many tokens the engine may add to so many (see
    ``admission.py``); where that ends a call, another one follows.
    ``memo``: shared with other episodes, so that equal pure snippets run once.
    ``gain``: shared with other episodes, so that blocks begin early only where that pays.
    ``trajectory``: filled in place if given, so that a caller who cancels still sees what there is
    (``CANCELLED``); it must be empty.

    ``metrics``: seconds ``generate_s`` (awaiting the engine), ``room_s`` (awaiting ``room``),
    ``tool_s`` (awaiting the sandbox), ``tool_wait_s`` (the part of it in which the snippet was not
    running); counts ``engine_calls``, ``early_runs`` (blocks begun before they were complete),
    ``memo_hits`` (blocks that need not run), ``dropped_tokens`` (sampled past a fence), and, from
    engines that tell, ``prefill_tokens`` and ``resume_prefill_tokens`` (all calls but the first).

    Raises ``SandboxError`` for a sandbox that is closed, ``CancelledError`` when cancelled.
    """
    if trajectory is None:
        trajectory = Trajectory(tuple(prompt_ids))
    elif trajectory.segments or trajectory.prompt_ids != tuple(prompt_ids):
        raise DataError(
            f"trajectory to fill has {len(trajectory)} tokens, expected the {len(prompt_ids)} of "
            "the prompt and no more"
        )
    trajectory.seed, trajectory.weight_version = sampling.seed, engine.weight_version
    early = EarlyRuns(sandbox, tool.request, gain)
    episode = _Running(
        engine, early, tool, limits, encode, sampling, eos_token_ids, session, room, memo,
        trajectory,
    )  # fmt: skip
    deadline = asyncio.timeout(limits.deadline_s)
    try:
        try:
            async with deadline:
                trajectory.stop_reason = await episode.run()
        finally:
            early.close()
            trajectory.metrics.update(episode.metrics)
            await engine.release(session)
    except TimeoutError:
        if not deadline.expired():
            raise
        trajectory.stop_reason = StopReason.DEADLINE
    except EngineError as error:
        trajectory.stop_reason = StopReason.ENGINE_FAILURE
        trajectory.error = f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        trajectory.stop_reason = StopReason.CANCELLED
        raise
    return trajectory


class _Watcher:
    """Shows the detector each token once, whether the engine calls it or the loop does."""

    def __init__(self, detector: ToolDetector) -> None:
        self._detector = detector
        self.n_tokens = 0
        self.call: DetectedCall | None = None

    def __call__(self, token_id: int) -> bool:
        self.n_tokens += 1
        self.call = self._detector.feed(token_id)
        return self.call is not None


@dataclass(slots=True)
class _Running:
    """The state of one episode; all but ``metrics`` is the caller's."""

    engine: Engine
    early: EarlyRuns
    tool: Tool
    limits: RolloutLimits
    encode: Callable[[str], Sequence[int]]
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    session: str
    room: Callable[[int], Awaitable[int]] | None
    memo: SnippetMemo | None
    trajectory: Trajectory
    metrics: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def run(self) -> StopReason:
        detector = self.tool.detector(self.early.draft)
        while True:
            budget, context = self._left()
            if budget < 1:
                return StopReason.MAX_TOKENS
            if context < 1:
                return StopReason.MAX_CONTEXT
            call, finish = await self._generate(detector, await self._allowed(min(budget, context)))
            if call is not None:
                stop = await self._answer(call, detector)
                if stop is not None:
                    return stop
            elif finish is FinishReason.STOP:
                return StopReason.EOS
            elif finish is FinishReason.CONTEXT:
                return StopReason.MAX_CONTEXT

    async def _allowed(self, most: int) -> int:
        """How many tokens the next engine call may sample: ``most`` or what there is room for."""
        if self.room is None:
            return most
        started = time.perf_counter()
        try:
            return min(most, await self.room(len(self.trajectory)))
        finally:
            self.metrics["room_s"] += time.perf_counter() - started

    def _left(self) -> tuple[int, int]:
        """Tokens that still fit: in the response budget, in the engine's context."""
        n_tokens = len(self.trajectory)
        response = n_tokens - len(self.trajectory.prompt_ids)
        return (
            self.limits.max_response_tokens - response,
            self.engine.capabilities.max_context - n_tokens,
        )

    async def _generate(
        self, detector: ToolDetector, max_tokens: int
    ) -> tuple[DetectedCall | None, FinishReason | None]:
        """One engine call: append what it samples, up to a call or its end."""
        watcher = _Watcher(detector)
        request = GenerateRequest(
            token_ids=tuple(self.trajectory.token_ids),
            session=self.session,
            max_tokens=max_tokens,
            stop_token_ids=self.eos_token_ids,
            sampling=self.sampling,
            watch=watcher if self.engine.capabilities.watch else None,
        )
        ids: list[int] = []
        logprobs: list[float] = []
        call: DetectedCall | None = None
        finish: FinishReason | None = None
        cut = False
        started = time.perf_counter()
        stream = self.engine.generate(request)
        try:
            async for chunk in stream:
                n_kept = _keep(chunk, watcher, len(ids))
                ids += chunk.token_ids[:n_kept]
                logprobs += chunk.logprobs[:n_kept]
                finish = chunk.finish
                self._count(chunk, n_kept)
                if watcher.call is not None and len(ids) == watcher.n_tokens:
                    call = watcher.call
                    cut = finish is None or n_kept < len(chunk.token_ids)
                    break
        finally:
            # Also when cancelled or broken: what was received so far is part of the record.
            self.trajectory.append(Segment(TokenSource.MODEL, tuple(ids), tuple(logprobs)))
            self.metrics["engine_calls"] += 1
            self.metrics["generate_s"] += time.perf_counter() - started
            await _close(stream)
        if cut:
            await self.engine.truncate(self.session, len(self.trajectory))
        if call is None and (finish in (None, FinishReason.WATCH) or not ids):
            raise EngineError(
                f"engine ended a call of session {self.session!r} after {len(ids)} tokens with "
                f"{finish}, expected tokens and a reason other than None or an unasked WATCH"
            )
        return call, finish

    async def _answer(self, found: DetectedCall, detector: ToolDetector) -> StopReason | None:
        """Run a call and append its observation; the stop reason if that ends the episode."""
        trajectory = self.trajectory
        offset = len(trajectory.prompt_ids)
        call = ToolCall(found.code, offset + found.start, offset + found.end)
        trajectory.tool_calls.append(call)
        if len(trajectory.tool_calls) > self.limits.max_tool_calls:
            return StopReason.MAX_TOOL_CALLS
        call.result = await self._execute(found)
        if call.result.status is Status.INFRA:
            trajectory.error = call.result.error
            return StopReason.TOOL_FAILURE
        observation = self.tool.observation(found, call.result)
        segment = splice_observation(self.encode, observation)
        if len(segment) > min(self._left()):
            return StopReason.OBSERVATION_OVERFLOW
        call.observation = observation
        trajectory.append(segment)
        detector.skip(len(segment))
        return None

    async def _execute(self, found: DetectedCall) -> ExecutionResult:
        started = time.perf_counter()
        run_s = 0.0
        try:
            if self.memo is None:
                result = await self._run(found)
            else:
                result, hit = await self.memo.run(
                    self.tool.request(found), lambda: self._run(found)
                )
                if hit:
                    self.early.drop()
                    self.metrics["memo_hits"] += 1
            run_s = result.wall_s
            return result
        finally:
            tool_s = time.perf_counter() - started
            self.metrics["tool_s"] += tool_s
            self.metrics["tool_wait_s"] += max(0.0, tool_s - run_s)

    async def _run(self, found: DetectedCall) -> ExecutionResult:
        result, early = await self.early.run(found)
        self.metrics["early_runs"] += early
        return result

    def _count(self, chunk: TokenChunk, n_kept: int) -> None:
        self.metrics["dropped_tokens"] += len(chunk.token_ids) - n_kept
        if chunk.prefill_tokens is not None:
            self.metrics["prefill_tokens"] += chunk.prefill_tokens
            if self.metrics["engine_calls"]:
                self.metrics["resume_prefill_tokens"] += chunk.prefill_tokens


def _keep(chunk: TokenChunk, watcher: _Watcher, n_before: int) -> int:
    """How many tokens of a chunk to keep: all, or up to the one that completes a call."""
    for n, token_id in enumerate(chunk.token_ids, 1):
        if n_before + n > watcher.n_tokens:
            watcher(token_id)
        if watcher.call is not None and n_before + n == watcher.n_tokens:
            return n
    return len(chunk.token_ids)


async def _close(stream: AsyncIterator[TokenChunk]) -> None:
    # The protocol asks for an iterator; generators, and whatever holds a sequence, have aclose.
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
