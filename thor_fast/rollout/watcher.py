"""Between the stream of tokens and the detector: each token is shown once, in order."""

from __future__ import annotations

from thor_fast.engines.base import TokenChunk
from thor_fast.tools.base import DetectedCall, ToolDetector

__all__ = ["Watcher"]


class Watcher:
    """Shows the detector each token once, whether the engine calls it or the loop does.

    For one engine call; ``call``: what the last of ``n_tokens`` completed.
    """

    def __init__(self, detector: ToolDetector) -> None:
        self._detector = detector
        self.n_tokens = 0
        self.call: DetectedCall | None = None

    def __call__(self, token_id: int) -> bool:
        self.n_tokens += 1
        self.call = self._detector.feed(token_id)
        return self.call is not None

    def keep(self, chunk: TokenChunk, n_before: int) -> int:
        """How many tokens of a chunk to keep: all, or up to the one that completes a call."""
        for n, token_id in enumerate(chunk.token_ids, 1):
            if n_before + n > self.n_tokens:
                self(token_id)
            if self.call is not None and n_before + n == self.n_tokens:
                return n
        return len(chunk.token_ids)
