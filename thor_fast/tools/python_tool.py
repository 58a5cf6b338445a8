"""Python in fenced blocks: found on token ids as they are sampled, answered in a dialect's words.

One instance serves all trajectories; each trajectory has its own detector. A response is taken to
start on a fresh line, as it does behind a chat template's assistant header.
"""

from __future__ import annotations

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

    def detector(self) -> PythonDetector:
        return PythonDetector(self._tokens, self.dialect.languages)

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
    """

    def __init__(self, tokens: TokenBytes, languages: frozenset[str]) -> None:
        self._tokens = tokens
        self._scanner = FenceScanner(languages)
        self._position = 0
        self._start = 0

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
        return call

    def skip(self, n_tokens: int) -> None:
        self._position += n_tokens
        self._scanner.restart()
