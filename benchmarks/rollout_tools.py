"""What every snippet of a run does before its own text: ``--tools`` of ``rollout_throughput.py``.

- ``plain``: nothing. The tiny policy's snippets import at most ``math`` and take a millisecond.
- ``sympy``: ``from sympy import *``, as models write it above most of their mathematics.
- ``mixed``: that above one snippet in eight, drawn by its first statement.
- ``slow``: it waits, on no CPU, as one does that asks another service: for a time drawn by the
  snippet's first statement, lognormal with a median of 0.25 s and sigma 1, so 0.41 s on average.

It stands on a line of its own in front, in all modes alike. What the model sees is the same as
without it, but for names that sympy brings along and for the rare error that tells a line number.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from thor_fast.sandbox.base import ClosedOnExit, ExecutionStream, Sandbox, StreamingSandbox
from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["TOOLS", "WAITING_SLOTS", "PreparedSandbox", "PreparedStreams"]

_MEDIAN_S, _SIGMA = 0.25, 1.0
# Snippets that only wait need no core each: as many may do so as sequences decode by default.
WAITING_SLOTS = 64
_ONE_IN = 8
# What may stand above the first statement that does something.
_NO_STATEMENT = re.compile(r"(?:[ \t]*(?:#.*|(?:import|from)\b.*)?\n)*")

Preparation = Callable[[str], str]


def _statements(code: str) -> str:
    """From the first line on that does something."""
    return _NO_STATEMENT.sub("", code, count=1)


def _nothing(code: str) -> str:
    return ""


def _sympy(code: str) -> str:
    return "from sympy import *\n"


def _drawn(code: str) -> random.Random:
    """What chance has in store for a snippet with this first statement."""
    first = _statements(code).partition("\n")[0]
    return random.Random(hashlib.blake2b(first.encode(), digest_size=8).digest())


def _mixed(code: str) -> str:
    return _sympy(code) if _drawn(code).randrange(_ONE_IN) == 0 else ""


def _wait(code: str) -> str:
    seconds = _MEDIAN_S * _drawn(code).lognormvariate(0.0, _SIGMA)
    return f"__import__('time').sleep({seconds:.4f})\n"


TOOLS: Mapping[str, Preparation] = {
    "mixed": _mixed,
    "plain": _nothing,
    "sympy": _sympy,
    "slow": _wait,
}


class PreparedSandbox(ClosedOnExit):
    """A sandbox whose snippets do something first. Closing it closes the sandbox."""

    def __init__(self, sandbox: Sandbox, preparation: Preparation) -> None:
        self._sandbox, self._preparation = sandbox, preparation

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        return self._sandbox.execute(self._prepared(request))

    def execute_batch(self, requests: Sequence[ExecutionRequest | str]) -> list[ExecutionResult]:
        return self._sandbox.execute_batch([self._prepared(request) for request in requests])

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        return await self._sandbox.submit(self._prepared(request))

    def close(self) -> None:
        self._sandbox.close()

    def _prepared(self, request: ExecutionRequest | str) -> ExecutionRequest:
        whole = ExecutionRequest(request) if isinstance(request, str) else request
        return replace(whole, code=self._preparation(whole.code) + whole.code)


class PreparedStreams(PreparedSandbox):
    """As :class:`PreparedSandbox`, for one with streams."""

    def __init__(self, sandbox: StreamingSandbox, preparation: Preparation) -> None:
        super().__init__(sandbox, preparation)
        self._open = sandbox.open

    def open(self, request: ExecutionRequest | None = None) -> ExecutionStream:
        return _PreparedStream(self._open(request), self._preparation)


class _PreparedStream:
    """Holds text back until its first statement's first line, which may decide, is complete."""

    def __init__(self, stream: ExecutionStream, preparation: Preparation) -> None:
        self._stream, self._preparation = stream, preparation
        self._held: str | None = ""
        self.close = stream.close

    def feed(self, text: str) -> None:
        if self._held is not None:
            text = self._held + text
            if "\n" not in _statements(text):
                self._held = text
                return
        self._stream.feed(self._ready(text))

    async def afinish(self, rest: str = "") -> ExecutionResult:
        return await self._stream.afinish(self._ready((self._held or "") + rest))

    def _ready(self, text: str) -> str:
        if self._held is None:
            return text
        self._held = None
        return self._preparation(text) + text
