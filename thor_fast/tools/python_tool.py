"""Python in fenced blocks: found on token ids as they are sampled, answered in a dialect's words.

One instance serves all trajectories; each trajectory has its own detector. A response is taken to
start on a fresh line, as it does behind a chat template's assistant header.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from thor_fast.tools.base import DetectedCall
from thor_fast.tools.dialect import THOR_DIALECT, ObservationDialect
from thor_fast.tools.fence import FenceEvent, FenceScanner
from thor_fast.tools.token_text import TokenBytes
from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["ExecutionLimits", "PythonDetector", "PythonTool"]


@dataclass(frozen=True, slots=True)
class ExecutionLimits:
    """Limits of every call, as in :class:`ExecutionRequest`; ``None`` is the sandbox's default."""

    timeout_s: float | None = None
    cpu_s: float | None = None
    memory_bytes: int | None = None
    max_output_bytes: int | None = None
    max_processes: int | None = None


_SANDBOX_DEFAULTS = ExecutionLimits()


class PythonTool:
    """Keeps :class:`~thor_fast.tools.base.Tool` for fenced Python.

    ``tokenizer``: the policy's; raises ``ToolError`` if :class:`TokenBytes` cannot read it.
    """

    def __init__(
        self,
        tokenizer: object,
        dialect: ObservationDialect = THOR_DIALECT,
        limits: ExecutionLimits = _SANDBOX_DEFAULTS,
    ) -> None:
        self.dialect = dialect
        self.limits = limits
        self._tokens = TokenBytes(tokenizer)

    def detector(self, draft: Callable[[DetectedCall], None] | None = None) -> PythonDetector:
        return PythonDetector(self._tokens, self.dialect.languages, draft)

    def request(self, call: DetectedCall) -> ExecutionRequest:
        return ExecutionRequest(call.code, **asdict(self.limits))

    def observation(self, call: DetectedCall, result: ExecutionResult) -> str:
        return self.dialect.render(result, call.trailing)


class PythonDetector:
    r"""Watches one trajectory; see :class:`~thor_fast.tools.base.ToolDetector`.

    Works on bytes, so that where a call ends does not depend on how the text was tokenised; costs
    a few operations per byte of code and next to nothing in prose. Fires once per block, at the
    token that completes the closing fence. A token that would close two blocks fires for the first:
    what lies behind a closing fence in its token was written before the observation and never runs.
    Drafts come once for each line of a block that begins a statement at the left margin: what is
    above it is complete, unless the line goes on a string or a bracket.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        languages: frozenset[str],
        draft: Callable[[DetectedCall], None] | None = None,
    ) -> None:
        self._tokens = tokens
        self._scanner = FenceScanner(languages)
        self._position = 0
        self._start = 0
        self._draft = draft
        self._drafted = 0  # the line of the last draft; the first line has nothing above it

    def feed(self, token_id: int) -> DetectedCall | None:
        data = self._tokens[token_id]
        if self._scanner.idle and b"\n" not in data:  # most of prose
            self._position += 1
            return None
        call: DetectedCall | None = None
        for i, byte in enumerate(data):
            event = self._scanner.feed(byte)
            if event is FenceEvent.TICK:
                self._start = self._position
            elif event is FenceEvent.CLOSED and call is None:
                call = DetectedCall(
                    code=self._scanner.code,
                    start=self._start,
                    end=self._position + 1,
                    trailing=data[i + 1 :].decode(errors="replace"),
                )
        self._position += 1
        if self._draft is not None and call is None and self._scanner.in_code:
            self._show(self._draft)
        elif call is not None:
            self._drafted = 0
        return call

    def _show(self, draft: Callable[[DetectedCall], None]) -> None:
        line = self._scanner.line_start
        code = self._scanner.draft() if line != self._drafted else None
        if code is not None:
            self._drafted = line
            draft(DetectedCall(code, self._start, self._position, ""))

    def skip(self, n_tokens: int) -> None:
        self._position += n_tokens
        self._drafted = 0
        self._scanner.restart()
