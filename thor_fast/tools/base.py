"""The contract between the loop and a tool the model calls by writing text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["DetectedCall", "Tool", "ToolDetector"]


@dataclass(frozen=True, slots=True)
class DetectedCall:
    """A complete call, found at the token that closes it.

    ``start`` and ``end`` count tokens fed to the detector: the half-open range of tokens that hold
    the call, from the one with the first byte of the opening fence to the one that completes the
    closing fence. ``trailing`` is what that last token holds after the closing fence (a tokenizer
    may merge the fence with a newline); it stays in the sequence as the model sampled it.
    """

    code: str
    start: int
    end: int
    trailing: str


class ToolDetector(Protocol):
    """Watches one trajectory's model tokens as they come; one instance per trajectory."""

    def feed(self, token_id: int) -> DetectedCall | None:
        """Take the next sampled token; returns the call it completes, if any."""
        ...

    def skip(self, n_tokens: int) -> None:
        """Note ``n_tokens`` spliced tokens: they count as positions, are not looked at, and end
        at the start of a line.
        """
        ...


class Tool(Protocol):
    """A kind of call: how it is found, what it executes, how its result reads to the model."""

    def detector(self, draft: Callable[[DetectedCall], None] | None = None) -> ToolDetector:
        """A fresh detector for one trajectory.

        ``draft`` is called from within ``feed``, so it must be quick and not raise. It is given a
        call that is still being written, at points where part of it may be complete: its ``code``
        so far, a prefix of the final one, ``end`` behind the last token and nothing ``trailing``.
        Drafts belong to the next call that ``feed`` returns, or to none if ``skip`` comes first.
        """
        ...

    def request(self, call: DetectedCall) -> ExecutionRequest:
        """What the sandbox is to run."""
        ...

    def observation(self, call: DetectedCall, result: ExecutionResult) -> str:
        """The text to splice in after the call. Never called for ``Status.INFRA``."""
        ...
