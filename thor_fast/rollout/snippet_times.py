"""How long the snippets of a run take: what there is to hide by beginning them early."""

from __future__ import annotations

from collections import deque

from thor_fast.types import ExecutionResult, Status

__all__ = ["SnippetTimes"]

_KEPT = 64
_FEWEST = 8
# Forty times what a stream costs more than a plain run, and about one token of a large model.
# Where the snippet shares its core with the model, a loss of one hundredth more than this.
_WORTH_HIDING_S = 0.02
# No block is in writing for longer, so of a longer snippet no more can be hidden; without a bound
# one that runs into its limit would speak for all others.
_MOST_HIDDEN_S = 1.0


class SnippetTimes:
    """The last snippets of a run. ``add`` on the event loop, ``worth_hiding`` from any thread."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=_KEPT)  # seconds
        self.worth_hiding = True
        """Whether they take 20 ms or more on average; also while fewer than eight are known."""

    def add(self, result: ExecutionResult) -> None:
        """Take note of one that ran."""
        if result.status is Status.INFRA:
            return
        self.recent.append(min(result.wall_s, _MOST_HIDDEN_S))
        mean = sum(self.recent) / len(self.recent)
        self.worth_hiding = len(self.recent) < _FEWEST or mean >= _WORTH_HIDING_S
