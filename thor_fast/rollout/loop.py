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

With a ``BacktrackPolicy`` a failed call is rolled back instead of answered (``backtrack.py``): the
engine forgets the KV behind the cut, a fresh detector is shown what is left of the turn, and the
next tokens are drawn from another seed. With ``one_call`` the episode is over when its first call
has a result.

Each kept token is shown to the detector once. Tokens are appended as they were sampled, with their
log-probs, and never encoded again. Whatever happens to model, sandbox or engine is recorded in the
trajectory; what raises out of here is a bug, misuse, or cancellation.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from thor_fast.engines.base import Engine, FinishReason, GenerateRequest, SamplingParams, TokenChunk
from thor_fast.errors import DataError, EngineError
from thor_fast.rollout.backtrack import (
    BacktrackPolicy,
    attempts_at,
    restore_best,
    retry_position,
    roll_back,
)
from thor_fast.rollout.early import EarlyRuns
from thor_fast.rollout.early_gain import EarlyGain
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.memo import SnippetMemo
from thor_fast.rollout.splice import splice_observation
from thor_fast.rollout.watcher import Watcher
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
    grown: Callable[[int], None] | None = None,
    first_tokens: int | None = None,
    memo: SnippetMemo | None = None,
    gain: EarlyGain | None = None,
    trajectory: Trajectory | None = None,
    backtrack: BacktrackPolicy | None = None,
    one_call: bool = False,
) -> Trajectory:
    """Run one episode and return its trajectory, which has a ``stop_reason``.

    ``encode``: observation text -> ids (:class:`~thor_fast.rollout.splice.ObservationEncoder`).
    ``session``: a name no other live episode uses; released at the end, whatever the end.
    ``grown``: told how many tokens there are, before each engine call and, during it, as they come.
    ``first_tokens``: at most so many in the first engine call; where that ends it, another follows.
    ``memo``: shared with other episodes, so that equal pure snippets run once.
    ``gain``: shared with other episodes, so that blocks begin early only where that pays.
    ``trajectory``: filled in place if given, so that a caller who cancels still sees what there is
    (``CANCELLED``). What it holds already is kept, counts for the limits, and the episode goes on
    behind it; a call that ends with its last token is run again.
    ``backtrack``: failed calls are tried again; ``one_call``: end with the first call's result.

    ``metrics``: seconds ``generate_s`` (awaiting the engine),
    ``tool_s`` (awaiting the sandbox), ``tool_wait_s`` (the part of it in which the snippet was not
    running); counts ``engine_calls``, ``early_runs`` (blocks begun before they were complete),
    ``memo_hits`` (blocks that need not run), ``dropped_tokens`` (sampled past a fence),
    ``attempts`` (calls rolled back, with ``rolled_back_tokens``), ``recovered_calls`` (that passed
    after that), and, from engines that tell, ``prefill_tokens`` and ``resume_prefill_tokens`` (all
    calls but the first).

    Raises ``SandboxError`` for a sandbox that is closed, ``CancelledError`` when cancelled.
    """
    trajectory = _opened(trajectory, tuple(prompt_ids), sampling.seed, engine.weight_version)
    if backtrack is not None:
        backtrack.check(sampling.temperature)
    early = EarlyRuns(sandbox, tool.request, gain)
    episode = _Running(
        engine, early, tool, limits, encode, sampling, eos_token_ids, session, grown, memo,
        trajectory, backtrack, one_call, first_tokens,
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


def _opened(
    trajectory: Trajectory | None, prompt_ids: tuple[int, ...], seed: int, version: int
) -> Trajectory:
    """The trajectory to fill; ``DataError`` for one of another prompt, or one that has ended."""
    if trajectory is None:
        trajectory = Trajectory(prompt_ids)
    if trajectory.prompt_ids != prompt_ids or trajectory.stop_reason is not None:
        raise DataError(
            f"trajectory to fill has a prompt of {len(trajectory.prompt_ids)} tokens and the stop "
            f"reason {trajectory.stop_reason}, expected the {len(prompt_ids)} tokens of the prompt "
            "given and no stop reason"
        )
    trajectory.weight_version = version
    if not trajectory.segments:
        trajectory.seed = seed
    elif trajectory.seed_at(len(trajectory)) != seed:
        trajectory.reseeded.append((len(trajectory), seed))
    return trajectory


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
    grown: Callable[[int], None] | None
    memo: SnippetMemo | None
    trajectory: Trajectory
    backtrack: BacktrackPolicy | None
    one_call: bool
    first_tokens: int | None
    detector: ToolDetector = field(init=False)
    metrics: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def run(self) -> StopReason:
        call = self._catch_up()
        if call is not None:  # it was cut off before its observation
            self.trajectory.tool_calls.pop()
        while True:
            stop = None if call is None else await self._answer(call)
            if stop is not None:
                return stop
            budget, context = self._left()
            if budget < 1:
                return StopReason.MAX_TOKENS
            if context < 1:
                return StopReason.MAX_CONTEXT
            call, finish = await self._generate(self._most(min(budget, context)))
            if call is None and finish is FinishReason.STOP:
                return StopReason.EOS
            if call is None and finish is FinishReason.CONTEXT:
                return StopReason.MAX_CONTEXT

    def _catch_up(self) -> DetectedCall | None:
        """Show a fresh detector the turn the model is in; the call that its last token completes.

        A turn is what the model has written since the last observation.
        """
        self.detector = self.tool.detector(self.early.draft)
        trajectory = self.trajectory
        last = trajectory.segments[-1] if trajectory.segments else None
        turn = last.token_ids if last is not None and last.source is TokenSource.MODEL else ()
        n_before = len(trajectory) - len(trajectory.prompt_ids) - len(turn)
        if n_before:
            self.detector.skip(n_before)
        call = None
        for token_id in turn:
            call = self.detector.feed(token_id)
        # Drafts of what was written before: it has run, or is handed on whole with what follows.
        self.early.drop()
        return call

    def _most(self, left: int) -> int:
        """How many tokens the next engine call may sample."""
        if self.first_tokens is None or self.metrics["engine_calls"]:
            return left
        return min(left, self.first_tokens)

    def _left(self) -> tuple[int, int]:
        """Tokens that still fit: in the response budget, in the engine's context."""
        n_tokens = len(self.trajectory)
        response = n_tokens - len(self.trajectory.prompt_ids)
        return (
            self.limits.max_response_tokens - response,
            self.engine.capabilities.max_context - n_tokens,
        )

    async def _generate(self, max_tokens: int) -> tuple[DetectedCall | None, FinishReason | None]:
        """One engine call: append what it samples, up to a call or its end."""
        watcher = Watcher(self.detector)
        request = GenerateRequest(
            token_ids=tuple(self.trajectory.token_ids),
            session=self.session,
            max_tokens=max_tokens,
            stop_token_ids=self.eos_token_ids,
            sampling=replace(self.sampling, seed=self.trajectory.seed_at(len(self.trajectory))),
            watch=watcher if self.engine.capabilities.watch else None,
        )
        ids: list[int] = []
        logprobs: list[float] = []
        call: DetectedCall | None = None
        finish: FinishReason | None = None
        cut = False
        n_before = len(request.token_ids)
        self._tell(n_before)
        started = time.perf_counter()
        stream = self.engine.generate(request)
        try:
            async for chunk in stream:
                n_kept = watcher.keep(chunk, len(ids))
                ids += chunk.token_ids[:n_kept]
                logprobs += chunk.logprobs[:n_kept]
                finish = chunk.finish
                self._count(chunk, n_kept)
                if finish is None:
                    self._tell(n_before + len(ids))
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

    async def _answer(self, found: DetectedCall) -> StopReason | None:
        """Run a call, then answer it or roll it back; the stop reason if it ends the episode."""
        trajectory = self.trajectory
        offset = len(trajectory.prompt_ids)
        attempt = len(attempts_at(trajectory, len(trajectory.tool_calls)))
        call = ToolCall(found.code, offset + found.start, offset + found.end, attempt=attempt)
        trajectory.tool_calls.append(call)
        if len(trajectory.tool_calls) > self.limits.max_tool_calls:
            return StopReason.MAX_TOOL_CALLS
        call.result = await self._execute(found)
        if call.result.status is Status.INFRA:
            trajectory.error = call.result.error
            return StopReason.TOOL_FAILURE
        if call.passed and attempt:
            self.metrics["recovered_calls"] += 1
        if self.backtrack is not None and not call.passed:
            if self.backtrack.allows(trajectory):
                await self._retry(self.backtrack, found, call.result)
                return None
            if self.backtrack.keep == "best":
                found = await self._settle(found)
        return StopReason.CALL_DONE if self.one_call else self._observe(found)

    def _observe(self, found: DetectedCall) -> StopReason | None:
        """Append the observation of the last call; the stop reason if it does not fit."""
        call = self.trajectory.tool_calls[-1]
        assert call.result is not None
        observation = self.tool.observation(found, call.result)
        segment = splice_observation(self.encode, observation)
        if len(segment) > min(self._left()):
            return StopReason.OBSERVATION_OVERFLOW
        call.observation = observation
        self.trajectory.append(segment)
        self.detector.skip(len(segment))
        return None

    async def _retry(
        self, policy: BacktrackPolicy, found: DetectedCall, result: ExecutionResult
    ) -> None:
        """Roll the last call back."""
        trajectory = self.trajectory
        cut = retry_position(trajectory, policy)
        n_removed = len(trajectory) - cut
        hint = Segment(TokenSource.TOOL, ())
        if policy.hint:
            # Nothing trails at the cut: the hint starts on a line of its own.
            text = self.tool.observation(replace(found, trailing=""), result)
            hint = splice_observation(self.encode, text)
            if len(hint) >= min(self._left()) + n_removed:
                hint = hint.head(0)
        roll_back(trajectory, cut, hint)
        self.metrics["attempts"] += 1
        self.metrics["rolled_back_tokens"] += n_removed
        await self._rewind(cut)

    async def _settle(self, found: DetectedCall) -> DetectedCall:
        """All tries have failed: have the best of them for the last call."""
        changed_from = restore_best(self.trajectory)
        best = None if changed_from is None else await self._rewind(changed_from)
        return best or found

    async def _rewind(self, cut: int) -> DetectedCall | None:
        """The tokens from ``cut`` on are others now: tell the engine and the detector."""
        if self.metrics["engine_calls"]:  # else there is nothing yet for it to forget
            await self.engine.truncate(self.session, cut)
        return self._catch_up()

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

    def _tell(self, n_tokens: int) -> None:
        if self.grown is not None:
            self.grown(n_tokens)

    def _count(self, chunk: TokenChunk, n_kept: int) -> None:
        self.metrics["dropped_tokens"] += len(chunk.token_ids) - n_kept
        if chunk.prefill_tokens is not None:
            self.metrics["prefill_tokens"] += chunk.prefill_tokens
            if self.metrics["engine_calls"]:
                self.metrics["resume_prefill_tokens"] += chunk.prefill_tokens


async def _close(stream: AsyncIterator[TokenChunk]) -> None:
    # The protocol asks for an iterator; generators, and whatever holds a sequence, have aclose.
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
