"""Going back behind a failed call: where to, and what becomes of what was there.

THOR's self-correction (section 3.4; ``BoN_policy`` of its code) cuts ``l_suf`` tokens before the
failed block and samples on from there::

    ... MODEL  first I need  the sum | ```python sun([1]) ```
                             ^cut      ^call.start
               <------- kept ><-------- an Attempt -------->

Everything here is on token ids and moves tokens, log-probs, mask and seeds together. A cut lies
between two tokens of the run of MODEL tokens that holds the start of the block, so neither in the
prompt nor in an observation. What is rolled back is kept in :attr:`Trajectory.attempts`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from thor_fast.errors import ConfigError, DataError
from thor_fast.rollout.seeds import attempt_seed
from thor_fast.types import Attempt, Segment, TokenSource, ToolCall, Trajectory

__all__ = [
    "BacktrackPolicy",
    "attempts_at",
    "beginning",
    "cut_position",
    "restore_best",
    "retry_position",
    "roll_back",
    "tail",
]


@dataclass(frozen=True, slots=True)
class BacktrackPolicy:
    """How a failed call is tried again. Defaults are THOR's, as far as it has the option.

    ``l_suf``: tokens before the block that are sampled again; ``growth``: so many more of them with
    each further try at the same place. ``attempts_per_call``, ``attempts_in_all``: how many failed
    calls may be rolled back at one place, and in one episode. ``hint``: what the model would have
    been shown of the failure is put at the cut, as TOOL tokens, in place of an earlier hint; where
    it does not fit, the try goes without. ``keep``: which of the failed tries goes on when no more
    are allowed: the ``last``, or the ``best``, the one to whose tokens the model gave the highest
    mean log-prob.
    """

    l_suf: int = 500
    growth: int = 0
    attempts_per_call: int = 4
    attempts_in_all: int = 8
    hint: bool = False
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("l_suf", "growth"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 0")
        for name in ("attempts_per_call", "attempts_in_all"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected >= 1")
        if self.keep not in ("last", "best"):
            raise ConfigError(f"keep is {self.keep!r}, expected 'last' or 'best'")

    def check(self, temperature: float) -> None:
        """Raise ``ConfigError`` where a retry could only write the same again."""
        if temperature == 0 and not self.hint:
            raise ConfigError(
                "temperature is 0, expected > 0 or a hint: a greedy retry writes the same again"
            )

    def allows(self, trajectory: Trajectory) -> bool:
        """Whether the last call of ``trajectory``, which has failed, may be tried once more."""
        here = len(attempts_at(trajectory, len(trajectory.tool_calls) - 1))
        return here < self.attempts_per_call and len(trajectory.attempts) < self.attempts_in_all


def cut_position(trajectory: Trajectory, call: ToolCall, l_suf: int) -> int:
    """The position ``l_suf`` tokens before ``call``, or where the run of MODEL tokens begins.

    Raises ``DataError`` where the call does not start in tokens of the model (its fence began in
    the prompt), or for a negative ``l_suf``.
    """
    if l_suf < 0:
        raise DataError(f"l_suf is {l_suf}, expected >= 0")
    position = len(trajectory.prompt_ids)
    for segment in trajectory.segments:
        end = position + len(segment)
        if position <= call.start < end and segment.source is TokenSource.MODEL:
            return max(position, call.start - l_suf)
        position = end
    raise DataError(
        f"call starts at token {call.start}, expected a token of the model's behind the "
        f"{len(trajectory.prompt_ids)} of the prompt and before the end at {len(trajectory)}"
    )


def attempts_at(trajectory: Trajectory, call_index: int) -> list[Attempt]:
    """The tries at one place that are not in the tokens."""
    return [a for a in trajectory.attempts if a.call_index == call_index]


def retry_position(trajectory: Trajectory, policy: BacktrackPolicy) -> int:
    """Where to cut for another try at the last call. A hint, and what precedes it, is passed over:
    ``l_suf`` counts tokens of the model.
    """
    call = trajectory.tool_calls[-1]
    earlier = attempts_at(trajectory, len(trajectory.tool_calls) - 1)
    l_suf = policy.l_suf + len(earlier) * policy.growth
    cut = cut_position(trajectory, call, l_suf)
    if not earlier or not earlier[-1].hint:
        return cut
    hint_start = earlier[-1].cut
    missing = max(0, l_suf - (call.start - hint_start - earlier[-1].hint))
    return max(_run_start(trajectory, hint_start), hint_start - missing)


def roll_back(trajectory: Trajectory, cut: int, hint: Segment) -> None:
    """Make an :class:`Attempt` of the last call and all from ``cut`` on; ``hint`` takes its place.

    What is sampled next is drawn from another seed, or it would be the same again.
    """
    call_index = len(trajectory.tool_calls) - 1
    attempt = _attempt(trajectory, cut, call_index, len(hint))
    seed = attempt_seed(trajectory.seed_at(cut), len(trajectory.attempts) + 1)
    trajectory.truncate(cut)
    trajectory.append(hint)
    trajectory.reseeded.append((len(trajectory), seed))
    trajectory.attempts.append(attempt)


def restore_best(trajectory: Trajectory) -> int | None:
    """Of all tries at the last call, put the one back whose tokens were likeliest.

    Compared is the mean log-prob of the MODEL tokens from the earliest cut on; of equals the last
    one stays. Those not chosen are the attempts then. Returns from which position on tokens have
    changed, ``None`` if none have.
    """
    call_index = len(trajectory.tool_calls) - 1
    attempts = attempts_at(trajectory, call_index)
    if not attempts:
        return None
    floor = min(a.cut for a in attempts)
    state = replace(trajectory)  # truncate gives it lists of its own
    best, highest = len(attempts), _mean_logprob(state, floor)
    for index in reversed(range(len(attempts))):
        _undo(state, attempts[index])
        score = _mean_logprob(state, floor)
        if score > highest:
            best, highest = index, score
    if best == len(attempts):
        return None
    given_up = _attempt(trajectory, floor, call_index, 0)
    for attempt in reversed(attempts[best:]):
        _undo(trajectory, attempt)
    kept = [a for a in trajectory.attempts if a is not attempts[best]]
    trajectory.attempts = [*kept, given_up]
    return floor


def tail(trajectory: Trajectory, start: int) -> tuple[Segment, ...]:
    """What lies from position ``start`` (not in the prompt) on."""
    segments = []
    position = len(trajectory.prompt_ids)
    for s in trajectory.segments:
        skip = max(0, start - position)
        if skip < len(s):
            logprobs = None if s.logprobs is None else s.logprobs[skip:]
            segments.append(Segment(s.source, s.token_ids[skip:], logprobs))
        position += len(s)
    return tuple(segments)


def beginning(trajectory: Trajectory, length: int) -> Trajectory:
    """A copy of the first ``length`` tokens, as the episode stood before it sampled the next one.

    Without score, ending and metrics; of the attempts those that had been made by then.
    """
    copy = replace(trajectory, reward=None, error="", metrics={})
    copy.truncate(length)
    # truncate has dropped the seed that takes over at this very position.
    copy.reseeded = [(p, s) for p, s in trajectory.reseeded if p <= length]
    n_calls = len(copy.tool_calls)
    made = [
        i for i, a in enumerate(trajectory.attempts) if a.cut <= length or a.call_index < n_calls
    ]
    copy.attempts = trajectory.attempts[: made[-1] + 1] if made else []
    return copy


def _attempt(trajectory: Trajectory, cut: int, call_index: int, hint: int) -> Attempt:
    return Attempt(
        cut=cut,
        segments=tail(trajectory, cut),
        call=trajectory.tool_calls[-1],
        call_index=call_index,
        reseeded=tuple((p, s) for p, s in trajectory.reseeded if p >= cut),
        hint=hint,
    )


def _undo(trajectory: Trajectory, attempt: Attempt) -> None:
    """Put back what the last roll-back took away; all before its cut has not changed since."""
    trajectory.truncate(attempt.cut)
    for segment in attempt.segments:
        trajectory.append(segment)
    trajectory.tool_calls.append(attempt.call)
    trajectory.reseeded.extend(attempt.reseeded)


def _run_start(trajectory: Trajectory, end: int) -> int:
    """Where the MODEL tokens begin that end before ``end``; ``end`` itself if there are none."""
    position = len(trajectory.prompt_ids)
    for segment in trajectory.segments:
        if position < end <= position + len(segment):
            return position if segment.source is TokenSource.MODEL else end
        position += len(segment)
    return end


def _mean_logprob(trajectory: Trajectory, start: int) -> float:
    logprobs = [p for s in tail(trajectory, start) if s.logprobs is not None for p in s.logprobs]
    return sum(logprobs) / len(logprobs)
