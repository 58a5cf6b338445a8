"""A recorded run again, without its sandbox, and one trajectory again from any of its steps.

What is exact, and when. Noise is a pure function of seed and position, and results come from the
record, so a trajectory takes the same way as long as the engine computes the same logits. The
embedded engine does so bit for bit when the same calls meet the same cache in the same steps: one
trajectory at a time (``max_live=1``), in the same order, on the same machine, versions and number
of threads. Then tokens and log-probs are equal bit for bit. A run of many at once is summed in
another order each time; replayed one at a time, its log-probs differ in the last digits of float32,
and a token can only differ where two of them all but tie. Measured with the tiny policy in float32
on a CPU, 140 episodes at temperature 1 with self-correction: one at a time, twice: all tokens and
log-probs equal; 32 at a time against one at a time: all tokens equal, log-probs within 2.3e-5.
:func:`first_difference` tells, so nothing has to be believed.

Not in a record, and to be given again: the weights, ``limits``, sampling parameters but the seed,
the policy, the tool. What ended by the clock, by cancellation or by a broken engine is replayed as
far as it had come.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import DataError
from thor_fast.rollout.backtrack import BacktrackPolicy, attempts_at, beginning
from thor_fast.rollout.branch import continuation
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.loop import run_episode
from thor_fast.sandbox.base import ClosedOnExit, Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import (
    ExecutionRequest,
    ExecutionResult,
    Status,
    StepGroup,
    StopReason,
    ToolCall,
    Trajectory,
)

__all__ = ["RecordedSandbox", "Replayer", "calls_in_order", "first_difference"]

# Engines may be shared between replayers.
_NUMBERS = itertools.count()
_UNREPEATABLE = (StopReason.DEADLINE, StopReason.CANCELLED, StopReason.ENGINE_FAILURE)


class RecordedSandbox(ClosedOnExit):
    """Keeps :class:`~thor_fast.sandbox.base.Sandbox` for one episode: gives what ``calls`` gave.

    They must come in that order: another code than the recorded one raises ``DataError``. A call
    that the record does not have, or has no result of, is ``Status.INFRA``.
    """

    def __init__(self, calls: Sequence[ToolCall]) -> None:
        self._calls = calls
        self._next = 0

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        code = request if isinstance(request, str) else request.code
        index = self._next
        self._next += 1
        if index >= len(self._calls):
            error = f"the record has {len(self._calls)} calls, and this is number {index + 1}"
            return ExecutionResult(Status.INFRA, error=error)
        recorded = self._calls[index]
        if code != recorded.code:
            raise DataError(
                f"call {index + 1} runs {code!r}, expected {recorded.code!r} as in the record"
            )
        if recorded.result is None:
            error = f"the record has no result of call {index + 1}"
            return ExecutionResult(Status.INFRA, error=error)
        return recorded.result

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        return [self.execute(r) for r in requests]

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        return self.execute(request)

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True, slots=True)
class Replayer:
    """Runs recorded trajectories again; the fields are as for :func:`run_episode`.

    ``sampling``: its seed is not used. ``limits``: but for the deadline. Each of the methods raises
    ``DataError`` where the engine has weights of another version than the record, and where a call
    runs another code than the recorded one.
    """

    engine: Engine
    tool: Tool
    encode: Callable[[str], Sequence[int]]
    limits: RolloutLimits
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    backtrack: BacktrackPolicy | None = None

    async def replay(self, recorded: Trajectory) -> Trajectory:
        """The whole of it, from its prompt, without a sandbox."""
        sandbox = RecordedSandbox(calls_in_order(recorded))
        start = Trajectory(recorded.prompt_ids)
        return await self._run(recorded, start, sandbox, recorded.seed)

    async def rerun(
        self,
        recorded: Trajectory,
        at_token: int,
        *,
        sandbox: Sandbox | None = None,
        seed: int | None = None,
    ) -> Trajectory:
        """The first ``at_token`` tokens as recorded, then sampled again.

        ``sandbox``: where calls run from there on; ``None``: they are answered from the record.
        ``seed``: ``None`` is the recorded one, which repeats what was sampled. A call that ends at
        ``at_token`` is run again. Raises ``DataError`` for a position in the prompt or among tokens
        of an observation.
        """
        start = beginning(recorded, at_token)
        call_ends = bool(start.tool_calls) and start.tool_calls[-1].end == at_token
        if not call_ends and at_token < len(recorded) and not recorded.loss_mask[at_token]:
            raise DataError(
                f"at_token is {at_token}, where the record has no token of the model's, expected "
                "one, or the end of a call"
            )
        if sandbox is None:
            made = [*(a.call for a in start.attempts), *start.tool_calls]
            known = {id(call) for call in (made[:-1] if call_ends else made)}
            left = [call for call in calls_in_order(recorded) if id(call) not in known]
            sandbox = RecordedSandbox(left)
        noise = start.seed_at(at_token) if seed is None else seed
        return await self._run(recorded, start, sandbox, noise)

    async def replay_step(self, step: StepGroup) -> StepGroup:
        """Every continuation of a step group."""
        start = beginning(step.parent, len(step.prefix_ids))
        ended = [
            await self._run(
                t,
                beginning(start, len(start)),
                RecordedSandbox(calls_in_order(t)),
                t.seed,
                one_call=True,
            )
            for t in step.continuations
        ]
        continuations = [continuation(start, t) for t in ended]
        return StepGroup(step.parent, step.call_index, step.prefix_ids, continuations)

    async def _run(
        self,
        recorded: Trajectory,
        start: Trajectory,
        sandbox: Sandbox,
        seed: int,
        *,
        one_call: bool = False,
    ) -> Trajectory:
        if self.engine.weight_version != recorded.weight_version:
            raise DataError(
                f"the engine has weights of version {self.engine.weight_version}, expected "
                f"{recorded.weight_version}, which sampled the record"
            )
        limits = replace(self.limits, deadline_s=None)
        if recorded.stop_reason in _UNREPEATABLE and isinstance(sandbox, RecordedSandbox):
            most = max(1, len(recorded) - len(start.prompt_ids))
            limits = replace(limits, max_response_tokens=min(most, limits.max_response_tokens))
        return await run_episode(
            self.engine,
            sandbox,
            self.tool,
            start.prompt_ids,
            limits,
            encode=self.encode,
            sampling=replace(self.sampling, seed=seed),
            eos_token_ids=self.eos_token_ids,
            session=f"replay{next(_NUMBERS)}",
            trajectory=start,
            backtrack=None if one_call else self.backtrack,
            one_call=one_call,
        )


def calls_in_order(trajectory: Trajectory) -> list[ToolCall]:
    """All calls that ran, in the order they did, those that were rolled back included."""
    last = max((a.call_index for a in trajectory.attempts), default=-1)
    calls = []
    for index in range(max(len(trajectory.tool_calls), last + 1)):
        tries = [a.call for a in attempts_at(trajectory, index)]
        tries += trajectory.tool_calls[index : index + 1]
        calls += sorted(tries, key=lambda call: call.attempt)
    return calls


def first_difference(
    recorded: Trajectory, replayed: Trajectory, *, logprob_tolerance: float = 0.0
) -> str | None:
    """Where two trajectories part, in words, or ``None`` where they do not.

    Compared are tokens, masks, log-probs, seeds, calls with their results, attempts and endings;
    not metrics, scores and versions. A record that ended in a way that cannot be repeated is
    compared as far as it goes.
    """
    ours, theirs = recorded.token_ids, replayed.token_ids
    for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"token {position} is {b}, expected {a}"
    if len(ours) != len(theirs):
        return f"{len(theirs)} tokens, expected {len(ours)}"
    if recorded.loss_mask.tolist() != replayed.loss_mask.tolist():
        return "the same tokens are from other sources"
    distance = abs(recorded.sampling_logprobs - replayed.sampling_logprobs)
    wrong = (~(distance <= logprob_tolerance)).nonzero()[0]
    if len(wrong):
        return f"log-prob of token {wrong[0]} differs by {distance[wrong[0]]}"
    if (recorded.seed, recorded.reseeded) != (replayed.seed, replayed.reseeded):
        return "the same tokens are drawn from other seeds"
    if len(recorded.attempts) != len(replayed.attempts):
        return f"{len(replayed.attempts)} attempts, expected {len(recorded.attempts)}"
    for number, (x, y) in enumerate(zip(recorded.attempts, replayed.attempts, strict=True)):
        if replace(x, segments=()) != replace(y, segments=()):
            return f"attempt {number} differs"
        gone = (Trajectory((), list(attempt.segments)) for attempt in (x, y))
        difference = first_difference(*gone, logprob_tolerance=logprob_tolerance)
        if difference is not None:
            return f"attempt {number}: {difference}"
    if recorded.stop_reason in _UNREPEATABLE:
        return None
    if recorded.tool_calls != replayed.tool_calls:
        return "tool_calls differ"
    if recorded.stop_reason is not replayed.stop_reason:
        return f"ended with {replayed.stop_reason}, expected {recorded.stop_reason}"
    return None
