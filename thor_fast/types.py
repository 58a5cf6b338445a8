"""The vocabulary: read this file first. Nouns are data, verbs are functions elsewhere.

A trajectory is a prompt followed by segments, and every token knows who wrote it::

    prompt | MODEL  think ```python print(6*7) ``` | TOOL  ```output 42 ``` | MODEL  so 42 <eos>

Masks come from that provenance (:attr:`Segment.source`), never from token values and never from
re-tokenised text. "Not scored" is ``None``, not 0: a zero would be a gradient.

>>> t = Trajectory(prompt_ids=(1, 2))
>>> t.append(Segment(TokenSource.MODEL, (10, 11), (-0.1, -0.2)))
>>> t.append(Segment(TokenSource.TOOL, (20, 21, 22)))
>>> t.append(Segment(TokenSource.MODEL, (12,), (-0.3,)))
>>> t.token_ids
[1, 2, 10, 11, 20, 21, 22, 12]
>>> t.loss_mask.tolist()
[0, 0, 1, 1, 0, 0, 0, 1]
>>> t.sampling_logprobs.tolist()
[0.0, 0.0, -0.1, -0.2, 0.0, 0.0, 0.0, -0.3]

Rolling back rewinds tokens, log-probs and mask together, and may cut inside a segment:

>>> t.truncate(3)
>>> t.token_ids, t.loss_mask.tolist()
([1, 2, 10], [0, 0, 1])
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thor_fast.errors import DataError

__all__ = [
    "Attempt",
    "ExecutionRequest",
    "ExecutionResult",
    "RolloutGroup",
    "Segment",
    "Status",
    "StepGroup",
    "StopReason",
    "TokenSource",
    "ToolCall",
    "Trajectory",
]


class TokenSource(enum.Enum):
    """Who wrote a token."""

    MODEL = "model"
    """Sampled by the policy: trainable, has a log-prob."""
    TOOL = "tool"
    """Observation text spliced in by us: never trainable."""


class StopReason(enum.Enum):
    """Why a trajectory ended. Every ending has one."""

    EOS = "eos"
    """The model sampled an end-of-sequence token."""
    MAX_TOKENS = "max_tokens"
    """The response budget (``RolloutLimits.max_response_tokens``) is used up."""
    MAX_CONTEXT = "max_context"
    """The engine's context length is reached."""
    MAX_TOOL_CALLS = "max_tool_calls"
    """The model asked for one more call than ``RolloutLimits.max_tool_calls``; it did not run."""
    OBSERVATION_OVERFLOW = "observation_overflow"
    """The observation did not fit in what was left of the budget; it was not appended."""
    CALL_DONE = "call_done"
    """The one call that was asked for has its result (``run_episode(one_call=True)``)."""
    DEADLINE = "deadline"
    """``RolloutLimits.deadline_s`` passed."""
    TOOL_FAILURE = "tool_failure"
    """The sandbox could not run the call (``Status.INFRA``): not the model's fault, not scored."""
    ENGINE_FAILURE = "engine_failure"
    """The engine raised; ``Trajectory.error`` says what. Not scored."""
    CANCELLED = "cancelled"
    """The caller cancelled the rollout. Not scored."""

    @property
    def is_infrastructure(self) -> bool:
        """True where the ending says nothing about the model: such a trajectory is not scored."""
        return self in (
            StopReason.TOOL_FAILURE,
            StopReason.ENGINE_FAILURE,
            StopReason.CANCELLED,
        )


class Status(enum.Enum):
    """What became of one snippet. Only ``OK`` passes; ``INFRA`` is our fault, all else is data."""

    OK = "ok"
    """Ran to its end with exit code 0, also when it printed nothing."""
    ERROR = "error"
    """An uncaught exception, a non-zero exit code, or death by a signal of its own making."""
    TIMEOUT = "timeout"
    """Wall-clock or CPU-time limit."""
    MEMORY = "memory"
    """Memory limit."""
    OUTPUT = "output"
    """Printed more than ``max_output_bytes``; head and tail are kept."""
    KILLED = "killed"
    """Killed for breaking the policy (a forbidden system call)."""
    INFRA = "infra"
    """We could not run it. Says nothing about the code."""


@dataclass(frozen=True, slots=True)
class ExecutionRequest:
    """One snippet to run, with its limits. ``None`` means the sandbox's default.

    ``code``: source text. ``stdin``: what the snippet reads. ``timeout_s``: wall-clock seconds from
    the moment the snippet starts (never counting time in a queue). ``cpu_s``: CPU seconds.
    ``memory_bytes``: what it may allocate on top of the interpreter. ``max_output_bytes``: kept of
    stdout and of stderr, each. ``max_processes``: processes and threads at a time. ``files``:
    written to the working directory first, by relative path. ``env``: added to the minimal
    environment. ``collect``: relative paths of files to hand back, see :class:`ExecutionResult`.
    ``priority``: of those that wait for a slot the highest goes first, equals in their order.
    """

    code: str
    language: str = "python"
    stdin: str | bytes = b""
    timeout_s: float | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None
    max_output_bytes: int | None = None
    max_processes: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    collect: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What one snippet did.

    ``exit_code`` is ``None`` unless the interpreter exited by itself, ``signal`` is ``None`` unless
    a signal ended it. ``wall_s`` runs from start to end of the snippet, ``cpu_s`` is user + system
    time of the snippet and the children it waited for. ``truncated``: output was cut. ``error``:
    for ``INFRA``, which step of ours failed and how. ``files``: the contents of those paths of
    ``ExecutionRequest.collect`` at which a regular file was left, however the snippet ended.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    truncated: bool = False
    error: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """The call's success: True, False, or ``None`` where the infrastructure failed.

        >>> ExecutionResult(Status.OK).passed, ExecutionResult(Status.INFRA).passed
        (True, None)
        """
        return None if self.status is Status.INFRA else self.status is Status.OK


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens from one source. ``logprobs`` (natural log, as sampled) iff MODEL.

    >>> Segment(TokenSource.TOOL, (5, 6)).loss_mask
    (0, 0)
    """

    source: TokenSource
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.source is TokenSource.MODEL:
            got = None if self.logprobs is None else len(self.logprobs)
            if got != len(self.token_ids):
                raise DataError(
                    f"MODEL segment has {got} log-probs, expected {len(self.token_ids)}, "
                    "one per token"
                )
        elif self.logprobs is not None:
            raise DataError("TOOL segment has log-probs, expected None: nobody sampled it")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """1 for each token the model sampled, 0 for each token spliced in."""
        return (1 if self.source is TokenSource.MODEL else 0,) * len(self.token_ids)

    def head(self, n: int) -> Segment:
        """The first ``n`` tokens, with their log-probs."""
        logprobs = None if self.logprobs is None else self.logprobs[:n]
        return Segment(self.source, self.token_ids[:n], logprobs)


@dataclass(slots=True)
class ToolCall:
    """One fenced block the model wrote, and what running it gave.

    ``start`` and ``end`` are positions in :attr:`Trajectory.token_ids`: the half-open range of the
    tokens that hold the block from its opening fence to its closing one. ``result`` is ``None``
    while it runs, or when the trajectory ended before it could. ``attempt``: how many others at
    this place failed and were rolled back before it ran.
    """

    code: str
    start: int
    end: int
    result: ExecutionResult | None = None
    observation: str = ""
    attempt: int = 0

    @property
    def passed(self) -> bool | None:
        """``result.passed``; ``None`` when it never ran or the infrastructure failed."""
        return None if self.result is None else self.result.passed


@dataclass(frozen=True, slots=True)
class Attempt:
    """A failed call that self-correction rolled back: kept to be looked at, seen by no model.

    ``segments``: what was there from position ``cut`` on, up to the end of the block. ``call``:
    with the positions it had; ``call_index``: its place in :attr:`Trajectory.tool_calls`.
    ``reseeded``: as in :class:`Trajectory`, from ``cut`` on. ``hint``: so many TOOL tokens were put
    at ``cut`` in place of all this.
    """

    cut: int
    segments: tuple[Segment, ...]
    call: ToolCall
    call_index: int
    reseeded: tuple[tuple[int, int], ...] = ()
    hint: int = 0


@dataclass(slots=True)
class Trajectory:
    """One episode: a prompt, the segments that follow, the calls made, the ending and the score.

    ``reward`` is ``None`` until scored, and stays so where the infrastructure failed.
    ``weight_version`` is the engine's version of the weights that sampled it, ``seed`` what its
    sampling noise was drawn from: up to the first of the (position, seed) pairs of ``reseeded``, in
    which another one takes over from that position on. ``attempts``: failed calls that were rolled
    back, in the order they ran.
    """

    prompt_ids: tuple[int, ...]
    segments: list[Segment] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    stop_reason: StopReason | None = None
    reward: float | None = None
    seed: int = 0
    weight_version: int = 0
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    reseeded: list[tuple[int, int]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(len(s) for s in self.segments)

    @property
    def token_ids(self) -> list[int]:
        """[T] prompt and response, in order."""
        return [*self.prompt_ids, *self.response_ids]

    @property
    def response_ids(self) -> list[int]:
        """Everything after the prompt, observations included."""
        return [t for s in self.segments for t in s.token_ids]

    @property
    def loss_mask(self) -> npt.NDArray[np.int8]:
        """[T] int8: 1 where the model sampled the token, 0 in prompt and observations."""
        mask = [0] * len(self.prompt_ids)
        for segment in self.segments:
            mask.extend(segment.loss_mask)
        return np.asarray(mask, dtype=np.int8)

    @property
    def sampling_logprobs(self) -> npt.NDArray[np.float64]:
        """[T] float64: log-prob as sampled; 0.0 where ``loss_mask`` is 0."""
        out = [0.0] * len(self.prompt_ids)
        for segment in self.segments:
            out.extend([0.0] * len(segment) if segment.logprobs is None else segment.logprobs)
        return np.asarray(out, dtype=np.float64)

    def append(self, segment: Segment) -> None:
        """Add a segment; neighbours of one source are merged, so a segment is a maximal run."""
        if not segment.token_ids:
            return
        if self.segments and self.segments[-1].source is segment.source:
            last = self.segments.pop()
            logprobs = None
            if last.logprobs is not None and segment.logprobs is not None:
                logprobs = last.logprobs + segment.logprobs
            segment = Segment(segment.source, last.token_ids + segment.token_ids, logprobs)
        self.segments.append(segment)

    def seed_at(self, position: int) -> int:
        """What the noise of the token at ``position`` is drawn from."""
        return next((s for p, s in reversed(self.reseeded) if p <= position), self.seed)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens (prompt counted); calls that no longer fit go too.

        Attempts stay: they are no part of the tokens.
        """
        if not len(self.prompt_ids) <= length <= len(self):
            raise DataError(
                f"truncate to {length} tokens, expected {len(self.prompt_ids)} (the prompt) "
                f"to {len(self)} (the whole trajectory)"
            )
        kept: list[Segment] = []
        room = length - len(self.prompt_ids)
        for segment in self.segments:
            if room <= 0:
                break
            kept.append(segment if len(segment) <= room else segment.head(room))
            room -= len(segment)
        self.segments = kept
        self.tool_calls = [c for c in self.tool_calls if c.end <= length]
        self.reseeded = [(p, s) for p, s in self.reseeded if p < length]
        self.stop_reason = None


@dataclass(slots=True)
class RolloutGroup:
    """The trajectories sampled for one prompt: the unit of a group-relative advantage."""

    prompt_ids: tuple[int, ...]
    trajectories: list[Trajectory]
    task_id: str = ""

    @property
    def rewards(self) -> list[float | None]:
        """One per trajectory; ``None`` where not scored."""
        return [t.reward for t in self.trajectories]


@dataclass(slots=True)
class StepGroup:
    """Continuations of one failed tool call, re-sampled from ``prefix_ids`` (THOR, section 3.3).

    ``prefix_ids`` is ``parent.token_ids[:cut]`` token for token, where ``cut`` lies before the
    failed block. Each continuation is a trajectory whose prompt is that prefix, so its loss mask is
    0 there by construction.
    """

    parent: Trajectory
    call_index: int
    prefix_ids: tuple[int, ...]
    continuations: list[Trajectory]

    def __post_init__(self) -> None:
        n = len(self.prefix_ids)
        if list(self.prefix_ids) != self.parent.token_ids[:n]:
            raise DataError(f"prefix of {n} tokens is not a prefix of the parent's tokens")

    @property
    def rewards(self) -> list[float | None]:
        """1.0 where the re-sampled call passed, 0.0 where it failed, ``None`` where unknown."""
        return [_call_reward(t) for t in self.continuations]


def _call_reward(trajectory: Trajectory) -> float | None:
    if not trajectory.tool_calls:
        stop = trajectory.stop_reason
        return None if stop is not None and stop.is_infrastructure else 0.0
    passed = trajectory.tool_calls[0].passed
    return None if passed is None else float(passed)
